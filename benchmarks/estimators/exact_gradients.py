"""Exact gradients of single examples, at points of a run of exact federated training.

The run: 100 devices of 44 rows, 10 of them a round, 5 steps of 8 rows each, averaged, and the server's Adam. At the
points asked for, :class:`Backpropagation` runs with one example in a micro-batch, so that a sweep's gradient is that
example's. All is computed in float: the estimates are judged apart from the rounding of int8.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.harness.labelled_texts import READERS
from benchmarks.harness.minilm import packaged_model
from benchmarks.memory.subjects import Subject, export_command, opened
from coordinator.aggregation.server_optimizers import Moments, step
from coordinator.config import ServerOptimizerConfig
from coordinator.simulation.config import DataConfig
from coordinator.simulation.partition import Share, partition
from edge_runtime.data.batches import Batch, Tokenizer, draw_batches
from edge_runtime.data.examples import Examples, group_by_length
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.backpropagation import Backpropagation
from edge_runtime.execution.executor import Executor
from edge_runtime.package.manifest import MANIFEST, SliceSpec
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import HEAD_PREFIX, FloatArray, Values, decode_values, shapes
from edge_runtime.training.gradient import head_gradient

DEVICES, ROWS_PER_DEVICE, SLOTS, STEPS, BATCH, SEED = 100, 44, 10, 5, 8, 0
SEQUENCE = 64
#: The server's optimisers in that run, for slices and for the head. No search found the rates. The head's is small
#: because Adam's first step moves every entry by the whole rate, and 384 features of a class add up.
ADAM = ServerOptimizerConfig("adam", rate=0.01, tau=1e-4)
HEAD_ADAM = ServerOptimizerConfig("adam", rate=0.002, tau=1e-4)
Matrix = NDArray[np.float32]
_ARRAYS = ("gradients", "other", "residuals", "other_residuals", "last")


@dataclass(frozen=True)
class SliceType:
    """What is trained.

    Attributes:
        package: name of the package that has these slices, perhaps among others.
        options: options of ``edge-export package`` that make it.
        targets: names of the layers whose slices are trained.
        blocks: numbers of the blocks whose slices are trained; None for all.
    """

    package: str
    options: tuple[str, ...]
    targets: tuple[str, ...]
    blocks: tuple[int, ...] | None = None

    def of(self, specs: Sequence[SliceSpec]) -> tuple[SliceSpec, ...]:
        """The slices of this type among a package's."""
        return tuple(
            spec
            for spec in specs
            if spec.kind != "head"
            and any(spec.target.endswith(f".{name}") for name in self.targets)
            and (self.blocks is None or any(f"layer.{block}." in spec.target for block in self.blocks))
        )


_ALL = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
_XS = ("--slice", "lora_xs", "--rank", "4", "--targets", ",".join(_ALL))
_LORA = ("--slice", "lora", "--rank", "1", "--alpha", "1", "--targets", "query,value")
SLICE_TYPES = {
    "LoRA-XS, last 2 blocks": SliceType("lora-xs", _XS, _ALL, (4, 5)),
    "LoRA-XS, query and value": SliceType("lora-xs", _XS, ("query", "value")),
    "LoRA r=1, query and value": SliceType("lora", _LORA, ("query", "value")),
}


@dataclass(frozen=True)
class GradientSnapshot:
    """Exact gradients at one point of the run: what estimates there are made of and judged by.

    Attributes:
        round_number: number of rounds before this point.
        loss: mean loss over the rows of ``gradients``.
        specs: slices whose tensors lie side by side in a row of d numbers.
        gradients: gradients of the round's rows, (400, d): device by device, step by step, in the order of the batch.
        other: gradients of the rows of ten devices that are not in the round, (400, d).
        residuals: softmax minus one-hot (C classes) of the round's rows, (400, C).
        other_residuals: softmax minus one-hot of the other devices' rows, (400, C).
        last: mean gradient of the round before, at the values it had then, (d,).
        jvp_difference: largest difference of a batch's g·v to the dual programs' jvp, over the largest jvp.
    """

    round_number: int
    loss: float
    specs: tuple[SliceSpec, ...]
    gradients: Matrix
    other: Matrix
    residuals: Matrix
    other_residuals: Matrix
    last: FloatArray
    jvp_difference: float


def snapshots(
    folder: Path, data: Path, data_name: str, type_name: str, rounds: Sequence[int]
) -> list[GradientSnapshot]:
    """Snapshots of one run.

    Args:
        folder: folder for packages and snapshots; those that it has from an earlier call are taken as they are.
        data: folder of the data sets.
        data_name: data set, one of the names in ``READERS``.
        type_name: slice type, one of the names in ``SLICE_TYPES``.
        rounds: numbers of rounds after which a snapshot is taken.
    """
    slice_type = SLICE_TYPES[type_name]
    name = f"{data_name}, {type_name}".lower().replace(", ", "-").replace(" ", "-")
    files = {number: folder / f"{name}-round-{number}.checkpoint" for number in rounds}
    if not all(file.exists() for file in files.values()):
        run = ExactRun(folder, data, data_name, slice_type)
        for made in run.snapshots(rounds):
            save(files[made.round_number], made)
            print(f"{data_name}, {type_name}, round {made.round_number}: loss {made.loss:.3f}", flush=True)
    return [load(file) for file in files.values()]


def save(path: Path, snapshot: GradientSnapshot) -> None:
    """Write a snapshot: arrays as safetensors, the rest as its metadata."""
    arrays = {name: np.ascontiguousarray(getattr(snapshot, name)) for name in _ARRAYS}
    rest = {
        "round_number": str(snapshot.round_number),
        "loss": repr(snapshot.loss),
        "jvp_difference": repr(snapshot.jvp_difference),
        "specs": msgspec.json.encode(snapshot.specs).decode(),
    }
    save_file(arrays, path, rest)


def load(path: Path) -> GradientSnapshot:
    """Read what :func:`save` wrote."""
    with safe_open(path, "numpy") as file:
        rest = file.metadata()
        arrays = {name: file.get_tensor(name) for name in _ARRAYS}
    return GradientSnapshot(
        round_number=int(rest["round_number"]),
        loss=float(rest["loss"]),
        specs=msgspec.json.decode(rest["specs"], type=tuple[SliceSpec, ...]),
        jvp_difference=float(rest["jvp_difference"]),
        **arrays,
    )


class ExactRun:
    """The run of exact gradients on one data set with one slice type."""

    def __init__(self, folder: Path, data: Path, data_name: str, slice_type: SliceType) -> None:
        rows = READERS[data_name](data)
        labels = tuple(sorted(set(rows.labels or ())))
        package = _exported(folder, data_name, slice_type, rows.texts, rows.labels or (), labels)
        self.prepared = PreparedPackage.open(
            Package.open_known(package.package, package.sha256),
            package.prepared("float"),
            OnnxEngine(1).version,
        )
        self.manifest = package.manifest
        self.specs = slice_type.of(self.manifest.slices)
        self.names = tuple(spec.name for spec in self.specs)
        self.executor = Backpropagation(self.prepared, OnnxEngine(1), self.names)
        config = DataConfig(
            str(rows.path), str(rows.path), "dirichlet", alpha=1.0, rows_per_device=ROWS_PER_DEVICE
        )
        self.shares: list[Share] = partition(rows, config, DEVICES, SEED)
        self.rows = rows.indexed(labels)
        self.tokenizer = Tokenizer(package.package / self.manifest.tokenizer, SEQUENCE)
        start = (package.package / self.manifest.initial_state).read_bytes()
        self.values: Values = decode_values(start, self.manifest.slices)

    def snapshots(self, rounds: Sequence[int]) -> Iterator[GradientSnapshot]:
        """Train, and take a snapshot after each of these numbers of rounds, which ascend from 1 or more."""
        moments: dict[str, Moments] = {}
        last: Values = {}
        for number in range(max(rounds) + 1):
            if number in rounds:
                yield self._snapshot(number, last)
            if number == max(rounds):
                return
            last = self._mean_gradient(self._round_rows(number))
            for name, gradient in last.items():
                config = HEAD_ADAM if name.startswith(HEAD_PREFIX) else ADAM
                before = moments.get(name, Moments.initial(gradient.shape, config))
                change = -gradient.astype(np.float64)
                self.values[name], moments[name] = step(self.values[name], change, before, config)

    def _snapshot(self, number: int, last: Values) -> GradientSnapshot:
        rows, others = self._round_rows(number), self._round_rows(number, apart=True)
        gradients, residuals, loss = self._single(rows)
        other, other_residuals, _ = self._single(others)
        return GradientSnapshot(
            number,
            loss,
            self.specs,
            gradients,
            other,
            residuals,
            other_residuals,
            self._flat(last),
            self._check(rows[:BATCH], gradients[:BATCH]),
        )

    def _round_rows(self, number: int, *, apart: bool = False) -> list[int]:
        """Rows that a round's devices train on, in order; or with ``apart`` the rows of ten other devices."""
        order = np.random.default_rng([SEED, number]).permutation(DEVICES)
        chosen = order[SLOTS : 2 * SLOTS] if apart else order[:SLOTS]
        rows: list[int] = []
        for slot, device in enumerate(chosen):
            share = self.shares[device]
            for batch in draw_batches(
                len(share), seed=SEED, round_number=number, slot=slot, steps=STEPS, batch_size=BATCH
            ):
                rows += [share[position] for position in batch]
        return rows

    def _examples(self, rows: Sequence[int]) -> Examples:
        chosen = [self.rows[row] for row in rows]
        ids = self.tokenizer.encode(chosen)
        return Examples(ids, [row.label for row in chosen], self.manifest.pad_token_id, SEQUENCE)

    def _mean_gradient(self, rows: Sequence[int]) -> Values:
        """The mean gradient over some rows, of all trained slices and the head."""
        examples = self._examples(rows)
        batches = [examples.batch(group) for group in group_by_length(examples.ids, BATCH)]
        sweep, gradient = self.executor.gradient(self.values, batches)
        return {**gradient, **head_gradient(np.asarray(sweep.residual), np.asarray(sweep.features))}

    def _single(self, rows: Sequence[int]) -> tuple[Matrix, Matrix, float]:
        """Each example's own gradient (N, d) and residual (N, C), and the mean loss."""
        examples = self._examples(rows)
        gradients, residuals, losses = [], [], []
        for row in range(len(rows)):
            sweep, gradient = self.executor.gradient(self.values, [examples.batch([row])])
            gradients.append(self._flat(gradient))
            residuals.append(np.asarray(sweep.residual)[0])
            losses.append(float(sweep.loss[0]))
        return np.stack(gradients), np.stack(residuals), float(np.mean(losses))

    def _flat(self, gradient: Values) -> FloatArray:
        flat: FloatArray = np.concatenate([gradient[name].ravel() for name in shapes(self.specs)])
        return flat

    def _check(self, rows: Sequence[int], gradients: Matrix) -> float:
        """How far a batch's jvps by the dual programs are from g·v along the same random signs."""
        batch: Batch = self._examples(rows).batch(range(len(rows)))
        flat = np.random.default_rng(SEED).choice(np.float32([-1, 1]), gradients.shape)
        tangents, start = {}, 0
        for name, shape in shapes(self.specs).items():
            size = int(np.prod(shape))
            tangents[name] = flat[:, start : start + size].reshape(1, len(rows), *shape[1:])
            start += size
        jvps = Executor(self.prepared, OnnxEngine(1), self.names).sweep(self.values, [batch], [tangents]).jvps
        expected = (gradients * flat).sum(axis=1)
        return float(np.abs(np.asarray(jvps)[0] - expected).max() / np.abs(expected).max())


def _exported(
    folder: Path,
    data_name: str,
    slice_type: SliceType,
    texts: Sequence[str],
    labels: Sequence[str],
    names: Sequence[str],
) -> Subject:
    """A package of this slice type for this data set, exported unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{slice_type.package}-{data_name.lower()}"
    rows, label_file, package = folder / f"{name}.jsonl", folder / f"{name}.json", folder / f"{name}.package"
    if not (package / MANIFEST).exists():
        print(f"Exporting {name}", flush=True)
        some = [{"text": text, "label": label} for text, label in zip(texts[:16], labels, strict=False)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        label_file.write_text(json.dumps(list(names)), encoding="utf-8")
        options = ("--labels", str(label_file), "--sequence-limit", str(SEQUENCE), "--with-adjoint")
        command = export_command(folder, packaged_model(), rows, package, (*options, *slice_type.options))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return opened(name, packaged_model(), package, rows, threads=1)
