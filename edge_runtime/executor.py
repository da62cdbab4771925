"""Run a package's segments over micro-batches, segment by segment.

Segment-major order: one segment is run for every micro-batch before the next, so each weight is read once
a step. Segments before the first trained slice run their primal program; the segment that holds it the entry
program; those after it the dual program, which carries the tangent of the hidden state along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.data import Batch
from edge_runtime.engines import Array, Engine, LoadedProgram
from edge_runtime.errors import PackageError
from edge_runtime.package import Package, Program
from edge_runtime.slices import FloatArray, Values, key
from edge_runtime.weights import MappedWeights

DOT = "_dot"


@dataclass(frozen=True)
class Sweep:
    """What one pass over a batch gives.

    Attributes:
        loss: (B,) cross-entropy of each example.
        jvps: (K, B) directional derivatives, or None where no slice carried a tangent.
        logits: (B, C). residual: (B, C) softmax minus one-hot. features: (B, H), the head's input.
    """

    loss: FloatArray
    jvps: FloatArray | None
    logits: FloatArray
    residual: FloatArray
    features: FloatArray


@dataclass(frozen=True)
class _Stage:
    """A loaded segment: what to feed it, by name, and what of its surroundings is still needed after it."""

    program: Program
    loaded: LoadedProgram
    slice_inputs: Mapping[str, str]
    needed_later: frozenset[str]


class Executor:
    """The loaded programs of one task.

    Args:
        package: verified package.
        engine: loads the programs.
        trained: names of the slices that carry tangents; empty for evaluation and for head-only training.
    """

    def __init__(self, package: Package, engine: Engine, trained: Sequence[str] = ()) -> None:
        self.package = package
        self._engine = engine
        self.first_dual = first_dual_segment(package, trained)
        self._weights: list[MappedWeights] = []
        programs = [self._program_of(i) for i in range(len(package.manifest.segments))]
        self._stages = [self._load(i, programs) for i in range(len(programs))]

    def sweep(
        self,
        values: Values,
        micro_batches: Sequence[Batch],
        tangents: Sequence[Mapping[str, FloatArray]] | None = None,
    ) -> Sweep:
        """Run all segments over a batch.

        Args:
            values: of every slice, by flat name.
            micro_batches: the batch, cut into groups that are padded alike.
            tangents: for each micro-batch the trained slices' tangents, (K, b, *s) by flat name. Slices of
                dual segments that are not named get zeros.

        Returns:
            Results for all examples, in the order of the micro-batches.
        """
        flows: list[dict[str, Array]] = [
            {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "labels": b.labels}
            for b in micro_batches
        ]
        for stage in self._stages:
            for number, flow in enumerate(flows):
                given = tangents[number] if tangents is not None else {}
                outputs = stage.loaded.run(_inputs(stage, flow, values, given))
                for name in [name for name in flow if name not in stage.needed_later]:
                    del flow[name]
                flow.update(outputs)
        return Sweep(
            loss=_join(flows, "loss", 0),
            jvps=_join(flows, "loss" + DOT, 1) if "loss" + DOT in flows[0] else None,
            logits=_join(flows, "logits", 0),
            residual=_join(flows, "residual", 0),
            features=_join(flows, "features", 0),
        )

    def _program_of(self, index: int) -> Program:
        segment = self.package.manifest.segments[index]
        name = segment.primal
        if self.first_dual is not None and index >= self.first_dual:
            wanted = segment.entry if index == self.first_dual else segment.dual
            if wanted is None:
                raise PackageError(f"segment {segment.name} has no program that carries tangents")
            name = wanted
        return self.package.manifest.programs[name]

    def _load(self, index: int, programs: Sequence[Program]) -> _Stage:
        segment, program = self.package.manifest.segments[index], programs[index]
        weights = MappedWeights(self.package, segment)
        engine_program = self._engine_load(program, weights)
        weights.release_pages()
        self._weights.append(weights)
        later = frozenset(name for p in programs[index + 1 :] for name in p.inputs)
        return _Stage(program, engine_program, self._slice_inputs(index), later)

    def _engine_load(self, program: Program, weights: MappedWeights) -> LoadedProgram:
        bound = {name: weights.arrays[name] for name in program.weights}
        return self._engine.load(self.package.path(program.file), bound, program.outputs)

    def _slice_inputs(self, index: int) -> dict[str, str]:
        """Program input to flat tensor name, for the slices of one segment."""
        return {
            tensor.input: key(spec.name, tensor.name)
            for spec in self.package.manifest.slices
            if spec.segment == index
            for tensor in spec.tensors
        }


def first_dual_segment(package: Package, trained: Sequence[str]) -> int | None:
    """Index of the first segment that must carry tangents; None if no slice is trained by forward mode."""
    specs = [package.manifest.slice_named(name) for name in trained]
    return min((spec.segment for spec in specs if spec.kind != "head"), default=None)


def _inputs(
    stage: _Stage, flow: Mapping[str, Array], values: Values, tangents: Mapping[str, FloatArray]
) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    for name in stage.program.inputs:
        base = name.removesuffix(DOT)
        if name in flow:
            feeds[name] = flow[name]
        elif name in stage.slice_inputs:
            feeds[name] = values[stage.slice_inputs[name]]
        elif base in stage.slice_inputs:
            feeds[name] = _tangent(stage.slice_inputs[base], values, tangents)
        else:
            raise PackageError(f"program {stage.program.file} wants {name!r}, which nothing provides")
    return feeds


def _tangent(name: str, values: Values, tangents: Mapping[str, FloatArray]) -> FloatArray:
    """The tangent of a slice tensor; zeros if the task does not train it."""
    if name in tangents:
        return tangents[name]
    like = next(iter(tangents.values()))
    return np.zeros((*like.shape[:2], *values[name].shape[1:]), dtype=np.float32)


def _join(flows: Sequence[Mapping[str, Array]], name: str, axis: int) -> FloatArray:
    return np.concatenate([flow[name] for flow in flows], axis=axis)
