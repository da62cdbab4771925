"""Scores of a weight's entries, from which sparse slices choose: how far they move, or how much the loss hangs on them.

Both run the float model on the workstation, with a fresh head, on the rows of ``--check-data``.

* ``movement``: |θ₁ - θ₀| after a short dense training by exact gradients, as lottery-ticket sparse fine-tuning scores
  (Ansell et al. 2022, arXiv 2110.07560, section 3.2; there the warm-up trains the whole model for epochs).
* ``fisher``: the mean over rows and directions of (jvp·v)², by forward mode alone. A stand-in of our own for the Fisher
  information g². With standard normal v, E[(g·v)² v_e²] = ‖g‖² + 2 g_e²: the order of the scores is that of g_e², but
  ‖g‖² is common to all entries and noise, so that few directions tell little. (±1 entries would tell nothing.)
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from edge_runtime.data.batches import Tokenizer, draw_batches
from edge_runtime.data.examples import Examples
from edge_runtime.data.rows import NO_LABEL, Row
from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import TaskKind
from export.model.heads import HEAD
from export.model.load import LoadedModel, load_model
from export.packaging.programs import Progress
from export.packaging.tokenizer import write_tokenizer
from export.slices.sliced_linear import SlicedLinear, SliceOptions

MaskRule = Literal["movement", "fisher", "random"]
#: Steps of a warm-up and its batches. Adam moves each weight by about its rate a step.
STEPS, BATCH, RATE, HEAD_RATE = 48, 8, 1e-4, 1e-2
#: Directions of each batch, and batches, of the estimate by forward mode.
DRAWS, DRAWN_BATCHES = 16, 4


@dataclass(frozen=True)
class Scoring:
    """What scores are made of.

    Attributes:
        model: model folder.
        task: what the model is trained for.
        classes: size of the label set; 0 for a language model.
        rows: rows of real text, with labels for classification.
        sequence_limit: longest sequence, in tokens.
        targets: layers to adapt, as in :class:`~export.slices.sliced_linear.SliceOptions`.
        seed: seed of batches and directions.
        trust_remote_code: whether Python code of the model folder's own may run.
    """

    model: Path
    task: TaskKind
    classes: int
    rows: tuple[Row, ...]
    sequence_limit: int
    targets: tuple[str, ...]
    seed: int
    trust_remote_code: bool = False


def score(scoring: Scoring, rule: Literal["movement", "fisher"], progress: Progress) -> dict[str, Tensor]:
    """Scores (out, in) of each target's entries, by the module's name in the base model.

    Args:
        scoring: what they are made of.
        rule: ``movement`` or ``fisher``.
        progress: called with a sentence as each stage begins.

    Raises:
        ModelError: the rows have no labels, or training did not stay finite.
    """
    unlabelled = sum(row.label == NO_LABEL for row in scoring.rows)
    if scoring.classes and unlabelled:
        raise ModelError(
            f"--mask {rule} learns from the labels of --check-data, and {unlabelled} of its rows have none; label "
            "them, or take --mask random"
        )
    model, layers, examples = float_model(scoring)
    weights = {name: layer.linear.weight for name, layer in layers.items()}
    model.requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    if rule == "movement":
        progress(f"Training {len(weights)} matrices for {STEPS} steps to see which entries move")
        _train(model, examples, list(weights.values()), scoring.seed)
        scores = {name: (weight.detach() - before[name]).abs() for name, weight in weights.items()}
    else:
        progress(f"Estimating by forward mode how the loss hangs on the entries of {len(weights)} matrices")
        _train(model, examples, [], scoring.seed)
        scores = _fisher(model, examples, weights, scoring.seed)
    for name, found in scores.items():
        if not bool(torch.isfinite(found).all()):
            raise ModelError(f"--mask {rule}: scores of {name} are not finite; take --mask random")
    return scores


def float_model(scoring: Scoring) -> tuple[nn.Module, dict[str, SlicedLinear], Examples]:
    """The model in float with a fresh head, its target layers by their names in the base model, and the rows."""
    plain = SliceOptions("lora", rank=1, targets=scoring.targets)
    loaded = load_model(
        scoring.model, scoring.classes, plain, scoring.task, trust_remote_code=scoring.trust_remote_code
    )
    examples = _examples(scoring, loaded)
    model = loaded.materialise()
    layers = {
        name.removeprefix("encoder."): module
        for name, module in model.named_modules()
        if isinstance(module, SlicedLinear)
    }
    return model, layers, examples


def _examples(scoring: Scoring, loaded: LoadedModel) -> Examples:
    """The rows as token ids of the model's own tokenizer, cut at the package's limit."""
    limit = min(scoring.sequence_limit, loaded.position_limit)
    with tempfile.TemporaryDirectory(prefix="mask-") as folder:
        path = Path(folder) / "tokenizer.json"
        pad, _ = write_tokenizer(
            scoring.model, path, loaded.vocabulary, trust_remote_code=scoring.trust_remote_code
        )
        ids = Tokenizer(path, limit).encode(scoring.rows, at_least=1 if scoring.classes else 2)
    labels = [row.label for row in scoring.rows] if scoring.classes else None
    return Examples(ids, labels, pad, limit)


def _batches(examples: Examples, count: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    drawn = draw_batches(len(examples.ids), seed=seed, round_number=0, slot=0, steps=count, batch_size=BATCH)
    batches = [examples.batch(rows.tolist()) for rows in drawn]
    return [
        (torch.from_numpy(b.input_ids), torch.from_numpy(b.attention_mask), torch.from_numpy(b.labels))
        for b in batches
    ]


def _train(model: nn.Module, examples: Examples, weights: list[Tensor], seed: int) -> None:
    """Steps of Adam on matrices and on the head, which starts at zero; in place."""
    head = [parameter for name, parameter in model.named_parameters() if name.startswith(f"{HEAD}.")]
    moved = [*weights, *head]
    if not moved:
        return
    for parameter in moved:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": weights, "lr": RATE}, {"params": head, "lr": HEAD_RATE}])
    for batch in _batches(examples, STEPS, seed):
        optimizer.zero_grad()
        model(*batch)[0].mean().backward()
        optimizer.step()
    model.requires_grad_(False)


def _fisher(model: nn.Module, examples: Examples, weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The mean of (jvp·v)² over rows and standard normal directions v of all matrices together."""
    generator = torch.Generator().manual_seed(seed)
    names = {f"encoder.{name}.linear.weight": name for name in weights}
    primals = {full: weights[name].detach() for full, name in names.items()}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in _batches(examples, DRAWN_BATCHES, seed + 1):

        def loss(moved: dict[str, Tensor], batch: tuple[Tensor, ...] = batch) -> Tensor:
            result: Tensor = torch.func.functional_call(model, moved, batch)[0]
            return result

        for _ in range(DRAWS):
            tangents = {
                full: torch.randn(primal.shape, generator=generator) for full, primal in primals.items()
            }
            jvps: Tensor = torch.func.jvp(loss, (primals,), (tangents,))[1]
            for full, name in names.items():
                total[name] += (jvps * jvps).mean() * tangents[full] ** 2
    return {name: scores / (DRAWS * DRAWN_BATCHES) for name, scores in total.items()}
