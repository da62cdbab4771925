"""Before a package is written, its programs must agree with torch on real text.

Each arithmetic is compared with torch on the same quantised weights. ``float`` must agree to ``STRICT_LIMIT``: it
differs by nothing but the order of additions. The int8 arithmetics also round activations (and ``row_int8`` rounds
the weights once more), which is reported; one whose jvps no longer point the same way (``COSINE_LIMIT``) is not
offered.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from edge_runtime.data.batches import Batch, Row, Tokenizer, make_batch
from edge_runtime.data.rows import NO_LABEL
from edge_runtime.engines.choice import engine_maker
from edge_runtime.engines.engine import Engine
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import ModelError
from edge_runtime.execution.backpropagation import Backpropagation
from edge_runtime.execution.decoder import Decoder
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.execution.prepare import prepare
from edge_runtime.package.held import moved_part
from edge_runtime.package.manifest import Arithmetic, Manifest, QuantisationEffect, SelfCheck
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values, key
from edge_runtime.protocol.messages import LocalOptimizer, Task
from edge_runtime.training.tangents import draw_tangents
from export.model.slices import slice_and_tensor
from export.packaging.quantisation_effect import quantisation_effect
from export.packaging.torch_reference import TorchReference

STRICT_LIMIT = 1e-3
COSINE_LIMIT = 0.9
CHECK_DRAWS = 4
#: Most rows of a sample, most tokens of each, and most of all together: whatever the texts, a check takes bounded
#: time and memory.
CHECK_ROWS, CHECK_ROW_TOKENS, CHECK_TOKENS = 16, 128, 512
#: Slices are moved off their initial zeros, so that every path carries signal.
PERTURBATION = 0.02
#: Packages with weights up to this size are compared whole; of larger ones, at least this many blocks are.
WHOLE_BYTES, FEW_BLOCKS = 512 << 20, 2


def chosen_segments(manifest: Manifest) -> tuple[int, ...]:
    """Indices of the segments to compare: all, or for a large package some that use every program."""
    last = len(manifest.segments) - 1
    weights = {tensor.file for segment in manifest.segments for tensor in segment.weights.values()}
    if sum(manifest.files[file].bytes for file in weights) <= WHOLE_BYTES:
        return tuple(range(last + 1))
    firsts: dict[str, int] = {}
    for index in range(1, last):
        firsts.setdefault(manifest.segments[index].primal, index)
    blocks = sorted({*firsts.values(), *range(1, min(1 + FEW_BLOCKS, last))})
    return (0, *blocks, last)


@dataclass(frozen=True)
class CheckSample:
    """What the self-check runs programs and torch on.

    Attributes:
        batch: real text.
        values: every trainable tensor of the segments, by parameter name; derivatives are compared at these values.
        tangents: directions (K, B, *s) in which derivatives are compared, by flat name; the head has none.
    """

    batch: Batch
    values: dict[str, Tensor]
    tangents: Values


def draw_batch(
    tokenizer: Path, texts: tuple[str, ...], *, labels: int, sequence_limit: int, pad_token_id: int
) -> Batch:
    """The first texts as a batch within the bounds of a check: rows are cut off, and of long rows there are fewer.

    Args:
        tokenizer: tokenizer file of the package.
        texts: real texts; the first ``CHECK_ROWS`` are used, or fewer if they are long.
        labels: size of the label set; 0 for language modelling.
        sequence_limit: longest sequence of the package, in tokens.
        pad_token_id: token that pads.
    """
    rows = [Row(text, i % labels if labels else NO_LABEL) for i, text in enumerate(texts[:CHECK_ROWS])]
    limit = min(sequence_limit, CHECK_ROW_TOKENS)
    ids = Tokenizer(tokenizer, limit).encode(rows, at_least=1 if labels else 2)
    rows = rows[: max(1, CHECK_TOKENS // max(map(len, ids)))]
    return make_batch(
        ids[: len(rows)], [row.label for row in rows] if labels else None, pad_token_id=pad_token_id
    )


def draw_sample(package: Package, reference: TorchReference, batch: Batch) -> CheckSample:
    """A batch, slices moved off their zeros, and seeded tangents.

    Args:
        package: package that has only the segments to compare, made by :func:`shortened`.
        reference: same segments in torch.
        batch: real text, from :func:`draw_batch`.
    """
    trained = [moved_part(spec) for spec in package.manifest.slices if spec.kind != "head"]
    tangents = draw_tangents(_check_task(), trained, 0, range(len(batch.input_ids)))
    return CheckSample(batch, perturbed(reference), tangents)


def check_package(
    package: Package, reference: TorchReference, sample: CheckSample, engine_name: EngineName = "onnxruntime"
) -> dict[Arithmetic, SelfCheck]:
    """Compare loss and jvp of a package's programs with torch, in every arithmetic it offers on an engine.

    Args:
        package: package that has only the segments to compare.
        reference: same segments in torch.
        sample: text, values and tangents to run both on.
        engine_name: engine to run the programs on.

    Returns:
        The differences, by arithmetic.

    Raises:
        ModelError: in float arithmetic the two disagree beyond the limit; the message gives the differences.
    """
    package = package.for_engine(engine_name)
    manifest, batch, values, tangents = package.manifest, sample.batch, sample.values, sample.tangents
    expected_loss, expected_jvps, expected_gradient = _expected(reference, values, batch, tangents)

    checks: dict[Arithmetic, SelfCheck] = {}
    engine = engine_maker(engine_name)(torch.get_num_threads())
    for arithmetic in manifest.arithmetics:
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare(package, Path(folder) / "prepared", engine, arithmetic)
            sweep = _sweep(prepared, engine, values, batch, tangents)
            gradient = _adjoint_gradient(prepared, engine, values, batch)
            _check_packed(prepared, engine, values, batch)
            if arithmetic == "float" and manifest.generation is not None and engine_name == "onnxruntime":
                _check_decoding(prepared, engine, values, batch)
        checks[arithmetic] = SelfCheck(
            segments=len(manifest.segments),
            rows=len(batch.input_ids),
            loss=_difference(sweep.loss, expected_loss),
            jvp=_difference(_jvps(sweep), expected_jvps),
            jvp_cosine=_cosine(_jvps(sweep), expected_jvps),
            gradient=None if gradient is None else _difference(gradient, expected_gradient),
            gradient_cosine=None if gradient is None else _cosine(gradient, expected_gradient),
        )
    strict = checks["float"]
    if not (strict.loss < STRICT_LIMIT and strict.jvp < STRICT_LIMIT):
        raise ModelError(
            f"the programs for {engine_name} disagree with torch: loss by {strict.loss:.1e}, jvp by {strict.jvp:.1e}, "
            f"limit {STRICT_LIMIT:.0e}; nothing was written. Please report the model's architecture"
        )
    if strict.gradient is not None and not strict.gradient < STRICT_LIMIT:
        raise ModelError(
            f"the adjoint programs disagree with torch: gradient by {strict.gradient:.1e}, limit "
            f"{STRICT_LIMIT:.0e}; nothing was written. Please report the model's architecture"
        )
    return checks


def _check_packed(prepared: PreparedPackage, engine: Engine, values: dict[str, Tensor], batch: Batch) -> None:
    """Programs with packed weights, where there are some, must give the bits of those whose weights are fed.

    Raises:
        ModelError: they give others.
    """
    arithmetic = prepared.prepared.arithmetic
    if not any(arithmetic in program.packed for program in prepared.manifest.programs.values()):
        return
    flat = flat_values(values)
    packed = Executor(prepared, engine, (), "packed").sweep(flat, [batch]).loss
    fed = Executor(prepared, engine, (), "streamed").sweep(flat, [batch]).loss
    if not np.array_equal(packed, fed):
        raise ModelError(
            f"the programs with packed weights disagree with the others by {_difference(packed, fed):.1e} in "
            f"{arithmetic}, and must not at all; nothing was written. Please report the model's architecture"
        )


def _check_decoding(
    prepared: PreparedPackage, engine: Engine, values: dict[str, Tensor], batch: Batch
) -> None:
    """The first text, token by token, must have the loss that the primal programs give it.

    Raises:
        ModelError: the decode programs give other logits.
    """
    ids = batch.input_ids[0][batch.attention_mask[0] == 1].tolist()
    flat, decoder = flat_values(values), Decoder(prepared, engine, "streamed")
    half = max(1, len(ids) // 2)  # the first half at once, then one token at a time, as texts are generated
    losses = []
    for start, end in [(0, half), *((i, i + 1) for i in range(half, len(ids) - 1))]:
        logits = decoder.next_logits(flat, ids[start:end]).astype(np.float64)
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[end]])
    whole = Executor(prepared, engine, (), "streamed")
    expected = [_total_loss(whole, flat, ids[:end]) for end in (half, len(ids))]
    got, wanted = sum(losses), expected[1] - expected[0]
    if not abs(got - wanted) < STRICT_LIMIT * max(1.0, abs(expected[1])):
        raise ModelError(
            f"the programs that generate text disagree with those that train: loss {got:.4f} against {wanted:.4f}, "
            f"limit {STRICT_LIMIT:.0e}; nothing was written. Export without --with-generation, and please report the "
            "model's architecture"
        )


def _total_loss(executor: Executor, values: Values, ids: list[int]) -> float:
    """Sum of the losses of a text's tokens from the second on; 0 for a text of one."""
    if len(ids) < 2:
        return 0.0
    batch = make_batch([ids], None, pad_token_id=0)
    return float(executor.sweep(values, [batch]).loss[0]) * (len(ids) - 1)


def measure_effect(
    plain: TorchReference, quantised: TorchReference, sample: CheckSample
) -> QuantisationEffect:
    """What quantisation does to loss and directional derivatives of the sample."""
    directions = {
        name: torch.from_numpy(sample.tangents[_flat_name(name)])
        for name in sample.values
        if _flat_name(name) in sample.tangents
    }
    return quantisation_effect(plain, quantised, torch_inputs(sample.batch), sample.values, directions)


def shortened(package: Package, segments: tuple[int, ...]) -> Package:
    """The same package with some of its segments, and the slices those have."""
    manifest, places = package.manifest, {index: place for place, index in enumerate(segments)}
    slices = []
    for spec in manifest.slices:
        used = tuple(places[index] for index in spec.segments if index in places)
        if used:
            slices.append(msgspec.structs.replace(spec, segments=used))
    kept = tuple(manifest.segments[index] for index in segments)
    shorter = msgspec.structs.replace(manifest, segments=kept, slices=tuple(slices))
    return Package(package.folder, shorter, package.sha256)


def _check_task() -> Task:
    return Task(
        task_id="self-check",
        run_id="self-check",
        round=0,
        slot=0,
        seed=0,
        package="0" * 64,
        package_signature="A" * 86 + "==",
        state="0" * 64,
        slices=(),
        train_head=False,
        steps=1,
        batch_size=CHECK_ROWS,
        draws=CHECK_DRAWS,
        sequence_limit=1,
        optimizer=LocalOptimizer(),
        required_bytes=0,
        deadline_s=0,
    )


def perturbed(reference: TorchReference) -> dict[str, Tensor]:
    """Trainable tensors of a reference, moved off their values by seeded noise."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: reference.tensors[name]
        + PERTURBATION * torch.randn(reference.tensors[name].shape, generator=generator)
        for name in reference.trainable
    }


def flat_values(slices: dict[str, Tensor]) -> Values:
    """Trainable tensors of a classifier under the names packages use."""
    return {_flat_name(name): value.detach().numpy() for name, value in slices.items()}


def _flat_name(parameter: str) -> str:
    return key(*slice_and_tensor(parameter))


def torch_inputs(batch: Batch) -> dict[str, Tensor]:
    """A batch as the reference takes it."""
    return {
        "input_ids": torch.from_numpy(batch.input_ids),
        "attention_mask": torch.from_numpy(batch.attention_mask),
        "labels": torch.from_numpy(batch.labels),
    }


def _expected(
    reference: TorchReference, slices: dict[str, Tensor], batch: Batch, tangents: Values
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss (B,), jvps (K, B), and the mean gradient as one vector, tensors in name order."""
    loss, found = reference.example_gradients(torch_inputs(batch), slices)
    gradients = {name: gradient for name, gradient in flat_values(found).items() if name in tangents}
    jvps = sum(
        (gradient * tangents[name]).reshape(*tangents[name].shape[:2], -1).sum(-1)
        for name, gradient in gradients.items()
    )
    mean = {name: gradient.mean(axis=0) for name, gradient in gradients.items()}
    return loss.numpy(), np.asarray(jvps), _as_vector(mean)


def _adjoint_gradient(
    prepared: PreparedPackage, engine: Engine, values: dict[str, Tensor], batch: Batch
) -> np.ndarray | None:
    """The mean gradient by the adjoint programs as one vector, or None where there are none in this arithmetic."""
    trained = [spec.name for spec in prepared.manifest.slices if spec.kind != "head"]
    adjoint = prepared.manifest.segments[-1].adjoint
    if not trained or adjoint is None:
        return None
    if prepared.prepared.arithmetic not in prepared.manifest.programs[adjoint].variants:
        return None
    _, gradient = Backpropagation(prepared, engine, trained, "streamed").gradient(
        flat_values(values), [batch]
    )
    return _as_vector(gradient)


def _as_vector(arrays: Values) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def _sweep(
    prepared: PreparedPackage, engine: Engine, values: dict[str, Tensor], batch: Batch, tangents: Values
) -> Sweep:
    trained = [spec.name for spec in prepared.manifest.slices if spec.kind != "head"]
    bounds = [v.bounds.get("batch") for p in prepared.manifest.programs.values() for v in p.variants.values()]
    size = min((bound for bound in bounds if bound), default=len(batch.labels))
    groups = [slice(start, start + size) for start in range(0, len(batch.labels), size)]
    batches = [Batch(batch.input_ids[g], batch.attention_mask[g], batch.labels[g]) for g in groups]
    directions = [{name: tangent[:, g] for name, tangent in tangents.items()} for g in groups]
    return Executor(prepared, engine, trained, "streamed").sweep(flat_values(values), batches, directions)


def _jvps(sweep: Sweep) -> np.ndarray:
    if sweep.jvps is None:
        raise ModelError("the dual programs gave no directional derivative; nothing was written")
    return sweep.jvps


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def _cosine(got: np.ndarray, expected: np.ndarray) -> float:
    return float((got * expected).sum() / (np.linalg.norm(got) * np.linalg.norm(expected)))
