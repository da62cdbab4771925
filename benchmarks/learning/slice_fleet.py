"""A fleet in torch with any kind of slices, for ranks, exits and kept activations on one model, by exact gradients.

The model is all-MiniLM-L6-v2 in float as the exporter reads it, with the exporter's own slices, so that a slice
computes what its package computes. What the frozen blocks give is computed once a row. A round is one pass forwards and
backwards over its rows; the server's step is the coordinator's. Devices that hold fewer ranks or blocks take part with
those, and each rank is averaged over the devices that held it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.harness.minilm import packaged_model
from benchmarks.learning.datasets import TaskData
from coordinator.aggregation.server_optimizers import Moments, step
from coordinator.config import ServerOptimizerConfig
from coordinator.simulation.config import DataConfig
from coordinator.simulation.labelled_rows import read_labelled_rows
from coordinator.simulation.partition import Share, partition
from edge_runtime.data.batches import draw_batches
from export.model.load import load_model
from export.slices.sliced_linear import SliceOptions

DEVICES, SLOTS, BATCH, SEQUENCE, TOGETHER = 100, 10, 8, 64, 80
BLOCKS = 6
#: Intervals of confidence over which calibration is summed (Guo et al. 2017, arXiv 1706.04599, equation 3).
BINS = 15
Values = dict[str, Tensor]


@dataclass(frozen=True)
class FleetRun:
    """How a fleet trains.

    Attributes:
        rounds: number of rounds.
        steps: batches that a device takes a round.
        rate: the slices' rate at the server.
        head_rate: the head's.
        ranks: 0, or the ranks of nested slices, of which a step draws one.
        exits: numbers of the blocks behind which a text may leave; a step draws one.
        small: share of the devices that hold half the ranks, or the first half of the exits.
        refused: whether these take no part instead.
        noise: share of training labels that are another class.
    """

    rounds: int = 10
    steps: int = 2
    rate: float = 0.2
    head_rate: float = 0.01
    ranks: int = 0
    exits: tuple[int, ...] = (BLOCKS,)
    small: float = 0.0
    refused: bool = False
    noise: float = 0.0


@dataclass(frozen=True)
class Scores:
    """The model on dev rows.

    Attributes:
        accuracy: in percent.
        calibration_error: expected calibration error over :data:`BINS` intervals, in percent.
        by_owner: accuracy for each owner of dev rows; empty without owners.
    """

    accuracy: float
    calibration_error: float
    by_owner: dict[str, float] = field(default_factory=dict)


class SliceFleet:
    """100 devices with the rows of a task.

    Args:
        files: the task's files.
        rows_per_device: rows of each device.
        options: slices.
        mlp_topk: activations that feed-forward parts keep; None for all.
        frozen: number of first blocks without slices, whose outputs are kept.
        kept: what they gave, by file and row, of another fleet with the same rows, frozen blocks and activations.
    """

    def __init__(
        self,
        files: TaskData,
        rows_per_device: int,
        options: SliceOptions,
        *,
        mlp_topk: int | None = None,
        frozen: int = 4,
        kept: dict[tuple[str, int], Tensor] | None = None,
    ) -> None:
        torch.set_num_threads(1)
        self._files, self._rows_per_device, self._frozen = files, rows_per_device, frozen
        self.labels = json.loads(files.labels.read_text("utf-8"))
        loaded = load_model(packaged_model(), len(self.labels), options, features="mean", mlp_topk=mlp_topk)
        self._model: Any = loaded.materialise()
        self._model.requires_grad_(False)
        self.start = {
            name: value.detach().clone()
            for name, value in self._model.named_parameters()
            if name.startswith("head.") or name.rpartition(".")[2] in ("core", "A", "B", "values")
        }
        self._blocks = self._model.encoder.encoder.layer
        self._rows = {
            name: _read(path, self.labels) for name, path in (("train", files.train), ("dev", files.dev))
        }
        self._tokenizer = AutoTokenizer.from_pretrained(packaged_model())
        self._kept = {} if kept is None else kept

    @property
    def numbers(self) -> int:
        """Trainable numbers of the slices."""
        return sum(value.numel() for name, value in self.start.items() if not name.startswith("head."))

    def train(self, run: FleetRun, seed: int, shares: Sequence[Share] | None = None) -> Values:
        """The values after all rounds."""
        values = dict(self.start)
        configs = {name: _server(name, run) for name in values}
        moments = {name: Moments.initial(tuple(v.shape), configs[name]) for name, v in values.items()}
        shares = self.shares(seed) if shares is None else shares
        generator = np.random.default_rng([seed, 1])
        small = set(generator.permutation(len(shares))[: round(run.small * len(shares))].tolist())
        labels = self._noisy(run.noise, seed)
        for number in range(run.rounds):
            able = [d for d in range(len(shares)) if len(shares[d]) and not (run.refused and d in small)]
            chosen = np.random.default_rng([seed, number]).permutation(able)[:SLOTS].tolist()
            gradients = self._round(run, values, shares, chosen, small, labels, (seed, number), generator)
            for name, gradient in gradients.items():
                config = msgspec.structs.replace(
                    configs[name], rate=configs[name].number * (1 - number / run.rounds)
                )
                moved, moments[name] = step(
                    values[name].numpy(), -gradient.numpy().astype(np.float64), moments[name], config
                )
                values[name] = torch.from_numpy(np.asarray(moved, np.float32))
        return values

    def shares(self, seed: int) -> list[Share]:
        """The rows of each device, by a Dirichlet partition."""
        train = str(self._files.train)
        config = DataConfig(train, train, "dirichlet", alpha=1.0, rows_per_device=self._rows_per_device)
        return partition(read_labelled_rows(self._files.train), config, DEVICES, seed)

    def shares_of_owners(self, owners: Sequence[str], devices: int = 4) -> list[Share]:
        """The rows of each of some owners, over so many devices each."""
        rows = self._rows["train"][2]
        return [
            tuple(index for index, each in enumerate(rows) if each == owner)[first::devices]
            for owner in owners
            for first in range(devices)
        ]

    @torch.no_grad()
    def evaluate(self, values: Values, *, rank: int = 0, leave: int = BLOCKS) -> Scores:
        """Scores on the dev rows, with the first ranks alone (0 for all), leaving behind a block."""
        _, labels, owners = self._rows["dev"]
        shares = np.zeros((len(labels), len(self.labels)), np.float32)
        for group, hidden, mask in self._groups("dev", range(len(labels))):
            given = (hidden, mask, torch.tensor([labels[i] for i in group]))
            shares[group] = self._forward(at_rank(values, rank), *given, leave)[1].softmax(-1).numpy()
        right = shares.argmax(-1) == np.asarray(labels)
        by_owner = {
            owner: float(100 * right[[each == owner for each in owners]].mean())
            for owner in sorted(set(owners) - {""})
        }
        return Scores(
            float(100 * right.mean()), 100 * calibration_error(shares, np.asarray(labels)), by_owner
        )

    def _round(
        self,
        run: FleetRun,
        values: Values,
        shares: Sequence[Share],
        chosen: Sequence[int],
        small: set[int],
        labels: Sequence[int],
        place: tuple[int, int],
        generator: np.random.Generator,
    ) -> Values:
        """The round's mean gradients, each rank's and block's over the rows of devices that held it."""
        groups: dict[tuple[int, int], list[int]] = {}
        held: dict[tuple[int, int], int] = {}
        for slot, device in enumerate(chosen):
            half = device in small
            most = max(1, run.ranks // 2) if half else run.ranks
            exits = run.exits[: max(1, len(run.exits) // 2)] if half else run.exits
            batches = draw_batches(
                len(shares[device]),
                seed=place[0],
                round_number=place[1],
                slot=slot,
                steps=run.steps,
                batch_size=min(BATCH, len(shares[device])),
            )
            for batch in batches:
                rank = int(generator.integers(1, most + 1)) if run.ranks else 0
                leave = int(generator.choice(exits))
                groups.setdefault((rank, leave), []).extend(shares[device][row] for row in batch)
                held[most, exits[-1]] = held.get((most, exits[-1]), 0) + len(batch)
        total = {name: torch.zeros_like(value) for name, value in values.items()}
        for (rank, leave), rows in groups.items():
            leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
            for group, hidden, mask in self._groups("train", rows):
                wanted = torch.tensor([labels[rows[i]] for i in group])
                loss = self._forward(at_rank(leaves, rank), hidden, mask, wanted, leave)[0].sum()
                loss.backward()  # type: ignore[no-untyped-call]
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    total[name] += leaf.grad
        return {name: _mean(name, gradient, run, held) for name, gradient in total.items()}

    def _forward(
        self, values: Values, hidden: Tensor, mask: Tensor, labels: Tensor, leave: int
    ) -> tuple[Tensor, Tensor]:
        """Losses and logits of rows from what the frozen blocks gave."""
        keep = torch.zeros_like(mask, dtype=torch.float32)[:, None, None, :].masked_fill(
            mask[:, None, None, :] == 0, torch.finfo(torch.float32).min
        )
        for index in range(self._frozen, leave):
            before = f"encoder.encoder.layer.{index}."
            own = {name.removeprefix(before): v for name, v in values.items() if name.startswith(before)}
            found = torch.func.functional_call(self._blocks[index], own, (hidden,), {"attention_mask": keep})
            hidden = found[0] if isinstance(found, tuple) else found
        head = {name.removeprefix("head."): v for name, v in values.items() if name.startswith("head.")}
        loss, logits = torch.func.functional_call(self._model.head, head, (hidden, mask, labels))[:2]
        return loss, logits

    def _groups(self, name: str, rows: Sequence[int]) -> Any:
        """Places among ``rows``, hidden states and masks, rows of like length together."""
        self._enter(name, [row for row in dict.fromkeys(rows) if (name, row) not in self._kept])
        states = [self._kept[name, row] for row in rows]
        order = np.argsort([len(state) for state in states], kind="stable")
        for first in range(0, len(order), TOGETHER):
            group = order[first : first + TOGETHER]
            parts = [states[i] for i in group]
            hidden = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones(len(part), dtype=torch.int64) for part in parts], batch_first=True
            )
            yield group, hidden, mask

    @torch.no_grad()
    def _enter(self, name: str, rows: Sequence[int]) -> None:
        texts = self._rows[name][0]
        ids = {
            row: self._tokenizer(texts[row], truncation=True, max_length=SEQUENCE)["input_ids"]
            for row in rows
        }
        order = sorted(rows, key=lambda row: len(ids[row]))
        for first in range(0, len(order), TOGETHER):
            group = order[first : first + TOGETHER]
            padded = self._tokenizer.pad({"input_ids": [ids[row] for row in group]}, return_tensors="pt")
            mask = padded["attention_mask"]
            keep = torch.zeros_like(mask, dtype=torch.float32)[:, None, None, :].masked_fill(
                mask[:, None, None, :] == 0, torch.finfo(torch.float32).min
            )
            hidden = self._model.encoder.embeddings(padded["input_ids"])
            for block in self._blocks[: self._frozen]:
                found = block(hidden, attention_mask=keep)
                hidden = found[0] if isinstance(found, tuple) else found
            self._kept.update(
                {(name, row): hidden[k, : len(ids[row])].clone() for k, row in enumerate(group)}
            )

    def _noisy(self, noise: float, seed: int) -> list[int]:
        labels, generator = list(self._rows["train"][1]), np.random.default_rng([seed, 2])
        for row in np.flatnonzero(generator.random(len(labels)) < noise):
            labels[row] = (labels[row] + int(generator.integers(1, len(self.labels)))) % len(self.labels)
        return labels


def at_rank(values: Values, rank: int) -> Values:
    """Values with the first ranks of LoRA's factors alone, B times r / b (DyLoRA's alpha / b); 0 leaves all."""
    if not rank:
        return values
    cut = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if last == "A":
            cut[name] = value[:, :rank]
        elif last == "B":
            cut[name] = value[..., :rank] * (value.shape[-1] / rank)
        else:
            cut[name] = value
    return cut


def calibration_error(shares: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: mean over intervals of confidence of |accuracy - confidence|, by their rows."""
    sure, right = shares.max(-1), shares.argmax(-1) == labels
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [
        abs(right[place == b].mean() - sure[place == b].mean()) * (place == b).mean()
        for b in set(place.tolist())
    ]
    return float(sum(gaps))


def _mean(name: str, gradient: Tensor, run: FleetRun, held: dict[tuple[int, int], int]) -> Tensor:
    last = name.rpartition(".")[2]
    block = 0 if name.startswith("head.") else int(name.split(".")[3])
    reach = {most: 0 for most, _ in held}
    for (most, deepest), rows in held.items():
        reach[most] += rows if deepest > block else 0
    if not run.ranks or last not in ("A", "B"):
        return gradient / max(1, sum(reach.values()))
    side = 1 if last == "A" else 2
    counts = [
        max(1, sum(rows for most, rows in reach.items() if most > rank))
        for rank in range(gradient.shape[side])
    ]
    shape = [1, -1, 1] if side == 1 else [1, 1, -1]
    return gradient / torch.tensor(counts, dtype=torch.float32).reshape(shape)


def _server(name: str, run: FleetRun) -> ServerOptimizerConfig:
    if name.startswith("head."):
        return ServerOptimizerConfig(name="adam", rate=run.head_rate, tau=1e-3)
    return ServerOptimizerConfig(name="adam", rate=run.rate, tau=1e-4)


def _read(path: Path, labels: Sequence[str]) -> tuple[list[str], list[int], list[str]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    index = {label: number for number, label in enumerate(labels)}
    return [r["text"] for r in rows], [index[r["label"]] for r in rows], [r.get("owner", "") for r in rows]
