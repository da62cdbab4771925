"""A fleet in torch, where a round costs one pass forwards and backwards: for trials that the daemon cannot run yet.

The model is all-MiniLM-L6-v2 in float, with LoRA-XS cores at the linear layers of its last two blocks. What the first
four blocks give is computed once. A round takes each example's own gradient; directional derivatives are products with
it, so any estimator can be tried. Rows, devices' shares, batches, directions, estimates and server steps are those of
the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks.harness.minilm import packaged_model
from benchmarks.learning.arms import LAST_BLOCKS
from benchmarks.learning.datasets import TaskData
from coordinator.simulation.config import DataConfig
from coordinator.simulation.labelled_rows import read_labelled_rows
from coordinator.simulation.partition import Share, partition
from edge_runtime.data.batches import draw_batches
from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.training.feature_sums import FeatureSums
from export.slices.lora_xs import factors

DEVICES, SLOTS, STEPS, BATCH, SEQUENCE, TOGETHER = 100, 10, 5, 8, 64, 64
#: Blocks whose outputs are computed once.
FROZEN = 4
Matrix = NDArray[np.float32]
#: Makes the frozen factors (up, down) of a layer from its weight and the second moment of its inputs.
FactorMaker = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RoundGradients:
    """What a round's rows say, in the order device, step, batch.

    Attributes:
        gradients: each example's gradient of the d core entries, (400, d).
        losses: its cross-entropy, (400,).
        residuals: softmax minus one-hot, (400, C).
        features: input of the head, (400, H).
    """

    gradients: Matrix
    losses: NDArray[np.float64]
    residuals: Matrix
    features: Matrix


class TorchFleet:
    """100 devices with the rows of a task.

    Args:
        files: the task's files.
        rows_per_device: rows of each device.
        rank: inner side of the cores.
        every_block: whether the head reads the pooled outputs of all blocks side by side; else of the last.
    """

    def __init__(
        self, files: TaskData, rows_per_device: int, rank: int = 4, *, every_block: bool = False
    ) -> None:
        torch.set_num_threads(1)
        self._files, self._rows_per_device, self.rank = files, rows_per_device, rank
        self._every_block = every_block
        self._model = AutoModel.from_pretrained(packaged_model()).eval().requires_grad_(False)
        labels = json.loads(files.labels.read_text("utf-8"))
        self.classes = len(labels)
        index = {label: number for number, label in enumerate(labels)}
        self._labels: dict[str, Tensor] = {}
        self._hidden: dict[str, list[Tensor]] = {}
        self._early: dict[str, Tensor] = {}
        for name, path in (("train", files.train), ("dev", files.dev)):
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            self._labels[name] = torch.tensor([index[row["label"]] for row in rows])
            self._hidden[name], self._early[name] = self._entered([row["text"] for row in rows])
        encoder = self._model.encoder.layer
        self._layers = [
            encoder[int(block)].get_submodule(rest)
            for block, rest in (name.removeprefix("layer.").split(".", 1) for name in LAST_BLOCKS)
        ]
        self._inputs: list[Tensor] | None = None
        self._cores: list[Tensor] | None = None
        self.reset(lambda weight, _, size: factors(weight, size, 1.0))
        for number, layer in enumerate(self._layers):
            layer.register_forward_hook(self._hook(number))
        core = TensorSpec("core", (1, rank, rank), "core")
        self.specs = tuple(
            SliceSpec(name, "lora_xs", (int(name.split(".")[1]),), name, (core,)) for name in LAST_BLOCKS
        )
        self.size = len(LAST_BLOCKS) * rank * rank

    def reset(self, make: FactorMaker, texts: int = 64) -> None:
        """Take other frozen factors, made from the weights and from the layers' inputs on the first dev rows."""
        self._inputs, self._cores = [torch.zeros(0)] * len(self._layers), None
        with torch.no_grad():
            for _, hidden, mask, _, early in self._groups("dev", range(texts)):
                self._features(hidden, mask, early)
        moments, self._inputs = self._inputs, None
        made = [
            make(layer.weight, moment, self.rank) if len(moment) else factors(layer.weight, self.rank, 1.0)
            for layer, moment in zip(self._layers, moments, strict=True)
        ]
        self._up, self._down = [up for up, _ in made], [down for _, down in made]

    def shares(self, alpha: float, seed: int) -> list[Share]:
        """The rows of each device."""
        train = str(self._files.train)
        config = DataConfig(train, train, "dirichlet", alpha=alpha, rows_per_device=self._rows_per_device)
        return partition(read_labelled_rows(self._files.train), config, DEVICES, seed)

    def round_rows(self, shares: Sequence[Share], seed: int, number: int) -> list[int]:
        """Rows that ten devices of a round train on, in order."""
        rows: list[int] = []
        for slot, device in enumerate(np.random.default_rng([seed, number]).permutation(DEVICES)[:SLOTS]):
            share = shares[device]
            for batch in draw_batches(
                len(share), seed=seed, round_number=number, slot=slot, steps=STEPS, batch_size=BATCH
            ):
                rows += [share[position] for position in batch]
        return rows

    def gradients(self, rows: Sequence[int], cores: Matrix, weight: Matrix, bias: Matrix) -> RoundGradients:
        """Each example's own gradient; a row that is there several times is run once.

        Args:
            rows: rows of the training file.
            cores: values of the cores, (d,).
            weight: the head's weight, (C, H).
            bias: its bias, (C,).
        """
        unique, places = np.unique(np.asarray(rows), return_inverse=True)
        count = len(unique)
        found = RoundGradients(
            np.zeros((count, self.size), np.float32),
            np.zeros(count),
            np.zeros((count, self.classes), np.float32),
            np.zeros((count, weight.shape[1]), np.float32),
        )
        for group, hidden, mask, labels, early in self._groups("train", unique):
            own = [core.expand(len(group), -1, -1).clone().requires_grad_() for core in self._split(cores)]
            self._cores = own
            features = self._features(hidden, mask, early)
            logits = features @ torch.from_numpy(weight).T + torch.from_numpy(bias)
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            slopes = torch.autograd.grad(losses.sum(), own)
            self._cores = None
            found.gradients[group] = torch.cat([slope.flatten(1) for slope in slopes], dim=1).numpy()
            found.losses[group] = losses.detach().numpy()
            found.features[group] = features.detach().numpy()
            onehot = torch.nn.functional.one_hot(labels, self.classes)
            found.residuals[group] = (logits.softmax(-1) - onehot).detach().numpy()
        parts = (found.gradients, found.losses, found.residuals, found.features)
        return RoundGradients(*(part[places] for part in parts))

    @torch.no_grad()
    def evaluate(self, cores: Matrix, weight: Matrix, bias: Matrix) -> tuple[float, float]:
        """Accuracy in percent and mean loss on the dev rows."""
        correct, loss, count = 0, 0.0, 0
        self._cores = self._split(cores)
        for _, hidden, mask, labels, early in self._groups("dev", range(len(self._hidden["dev"]))):
            logits = self._features(hidden, mask, early) @ torch.from_numpy(weight).T + torch.from_numpy(bias)
            correct += int((logits.argmax(-1) == labels).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        self._cores = None
        return 100 * correct / count, loss / count

    @torch.no_grad()
    def sums(self, cores: Matrix) -> FeatureSums:
        """Sums over all training rows for a head in closed form."""
        rows = range(len(self._hidden["train"]))
        features = np.zeros((len(rows), self.width))
        self._cores = self._split(cores)
        for group, hidden, mask, _, early in self._groups("train", rows):
            features[group] = self._features(hidden, mask, early).numpy()
        self._cores = None
        onehot = np.eye(self.classes)[self._labels["train"].numpy()]
        beside = np.concatenate([np.ones((len(rows), 1)), onehot], axis=1)
        return FeatureSums(len(rows), features.T @ features, features.T @ beside, onehot.sum(axis=0))

    @property
    def width(self) -> int:
        """Number of features of the head."""
        config = self._model.config
        return int(config.hidden_size * (config.num_hidden_layers + 1 if self._every_block else 1))

    def _split(self, cores: Matrix) -> list[Tensor]:
        return [torch.from_numpy(part)[None] for part in cores.reshape(-1, self.rank, self.rank)]

    def _hook(self, number: int) -> Callable[[object, tuple[Tensor], Tensor], Tensor]:
        def hook(_: object, given: tuple[Tensor], output: Tensor) -> Tensor:
            if self._inputs is not None:
                flat = given[0][self._tokens]
                before, moment = self._inputs[number], flat.T @ flat
                self._inputs[number] = before + moment if len(before) else moment
            if self._cores is None:
                return output
            inner = torch.nn.functional.linear(given[0], self._down[number])
            inner = torch.matmul(inner, self._cores[number].transpose(-1, -2))
            return output + torch.nn.functional.linear(inner, self._up[number])

        return hook

    @torch.no_grad()
    def _entered(self, texts: Sequence[str]) -> tuple[list[Tensor], Tensor]:
        """What enters the first trained block, (T, H) for each text; and what the head reads of the blocks before."""
        tokenizer = AutoTokenizer.from_pretrained(packaged_model())
        ids = [tokenizer(text, truncation=True, max_length=SEQUENCE)["input_ids"] for text in texts]
        order = np.argsort([len(each) for each in ids], kind="stable")
        found: dict[int, Tensor] = {}
        early: dict[int, Tensor] = {}
        for first in range(0, len(order), TOGETHER):
            group = order[first : first + TOGETHER]
            padded = tokenizer.pad({"input_ids": [ids[i] for i in group]}, return_tensors="pt")
            states = self._model(**padded, output_hidden_states=True).hidden_states[: FROZEN + 1]
            found |= {int(i): states[FROZEN][k, : len(ids[i])].clone() for k, i in enumerate(group)}
            blocks = [_pooled(state, padded["attention_mask"]) for state in states]
            pooled = torch.cat(blocks, dim=1) if self._every_block else torch.zeros(len(group), 0)
            early |= {int(i): pooled[k] for k, i in enumerate(group)}
        return [found[i] for i in range(len(ids))], torch.stack([early[i] for i in range(len(ids))])

    def _groups(
        self, name: str, rows: Sequence[int] | NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor, Tensor, Tensor]]:
        """Places among ``rows``, hidden states, mask, labels and early features, rows of like length together."""
        kept, chosen = self._hidden[name], np.asarray(rows)
        order = np.argsort([len(kept[row]) for row in chosen], kind="stable")
        for first in range(0, len(order), TOGETHER):
            group = order[first : first + TOGETHER]
            parts = [kept[row] for row in chosen[group]]
            hidden = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones(len(part)) for part in parts], batch_first=True
            )
            yield group, hidden, mask, self._labels[name][chosen[group]], self._early[name][chosen[group]]

    def _features(self, hidden: Tensor, mask: Tensor, early: Tensor) -> Tensor:
        """Pooled outputs of the blocks that the head reads, side by side."""
        self._tokens = mask > 0
        keep = torch.zeros_like(mask)[:, None, None, :].masked_fill(
            mask[:, None, None, :] == 0, torch.finfo(torch.float32).min
        )
        made = [early]
        for block in self._model.encoder.layer[FROZEN:]:
            found = block(hidden, attention_mask=keep)
            hidden = found[0] if isinstance(found, tuple) else found
            made.append(_pooled(hidden, mask))
        return torch.cat(made, dim=1) if self._every_block else made[-1]


def _pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens (b, H) of hidden states (b, T, H), scaled to root mean square 1."""
    pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return pooled * torch.rsqrt((pooled * pooled).mean(-1, keepdim=True))
