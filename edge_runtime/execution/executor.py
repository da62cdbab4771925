"""Run a package's segments over micro-batches, segment by segment.

One segment is run for every micro-batch before the next segment, so each weight is read once a step. Segments before
the first trained slice run their primal program; the segment that holds it runs the entry program; those after it run
the dual program, which carries the tangent of the hidden state along.

Weights are mapped files. *Resident* weights stay in memory once their pages are touched. *Streamed* weights pass
through it: a segment's pages are given back after its last micro-batch, while the kernel already reads the next
segment's file ahead, so that the process holds one segment at a time. *Packed* weights are copied by the engine into
its kernels' order once, where otherwise it would do so at each run; each segment then has a loaded program of its own.

The outputs of the segments before the first trained slice can be kept (:mod:`edge_runtime.execution.prefix_cache`).

A run whose head reads several blocks computes it here, in place of the last segment
(:mod:`edge_runtime.execution.pooled_head`); blocks behind the last one that it reads do not run.

A draw is carried from the segment on in which it begins to move something. Draws come in the order in which they begin,
so a segment runs the first few of them; where none has begun it runs its primal program, if that is at hand. Those that
begin later find zeros in the hidden state's tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from edge_runtime.data.batches import Batch, IntArray
from edge_runtime.engines.engine import Array, Engine, LoadedProgram
from edge_runtime.errors import PackageError
from edge_runtime.execution.flow import DOT, HIDDEN, INPUTS, Flow
from edge_runtime.execution.pooled_head import PooledHead
from edge_runtime.execution.prefix_cache import ExampleStore
from edge_runtime.execution.ranked_inputs import ranked_inputs
from edge_runtime.execution.token_chunks import run_in_chunks
from edge_runtime.execution.weights import MappedWeights
from edge_runtime.memory.plan import HEAD_TOKENS, WeightsMode, first_segment, waiting_segments
from edge_runtime.package.manifest import Arithmetic, Program, Variant
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import FloatArray, Values, key


@dataclass(frozen=True)
class Sweep:
    """Outputs of one pass over a batch.

    Attributes:
        loss: (B,) cross-entropy of each example; for language modelling the mean over its predicted tokens.
        jvps: (K, B) directional derivatives; None where no slice carried a tangent.
        logits: (B, C) logits of a classification; None for language modelling.
        residual: (B, C) softmax minus one-hot of a classification; None for language modelling.
        features: (B, H) input of the head of a classification; None for language modelling.
        correct: (B,) int64, number of tokens that were predicted right; None for classification.
    """

    loss: FloatArray
    jvps: FloatArray | None
    logits: FloatArray | None = None
    residual: FloatArray | None = None
    features: FloatArray | None = None
    correct: IntArray | None = None


@dataclass(frozen=True)
class Stage:
    """A segment with everything that running it takes.

    Attributes:
        index: index of the segment.
        program: program of the segment that runs.
        variant: that program in the package's arithmetic.
        weights: mapped weights of the segment.
        slice_inputs: flat tensor name for each program input that takes a slice tensor.
        needed_later: names of the values that later segments still need.
        loaded: the loaded program; None where it is loaded at each use.
        weight_bytes: bytes of weights that one run reads, gathered rows not counted.
        by_tokens: whether this is a language model's output layer, which runs some tokens at a time.
        primal: the segment's primal program, to run where no draw has begun; None where it is not loaded.
    """

    index: int
    program: Program
    variant: Variant
    weights: MappedWeights
    slice_inputs: Mapping[str, str]
    needed_later: frozenset[str]
    loaded: LoadedProgram | None
    weight_bytes: int
    by_tokens: bool
    primal: Stage | None = None


class Executor:
    """The programs and weights of one task.

    Args:
        prepared: the package, prepared for this machine.
        engine: engine that loads the programs.
        trained: names of the slices that are trained; empty for evaluation and where the head alone is trained.
        weights: whether weights stay in memory, packed or as they are mapped, or pass through it.
        cache: store for the outputs of the segments before the first trained slice; None computes them every time.
        carries_tangents: whether segments from the first trained slice on run their dual programs. Otherwise all
            segments run their primal ones, and values are moved instead (:mod:`edge_runtime.training.zero_order`).

    Attributes:
        manifest: the package's manifest.
        first_trained: index of the first segment with a trained slice; None if there is none.
        observe: function called after each segment, while its weights are still mapped, with the values that wait for
            later segments; None calls nothing.
        weights_read_bytes: bytes of weights that all sweeps together have read, counted once for each segment and
            sweep.
        draws_run: number of draws that segments ran, added up over segments and examples.
        draws_skipped: number of draws that they did not run because none had begun there, added up likewise.
    """

    def __init__(
        self,
        prepared: PreparedPackage,
        engine: Engine,
        trained: Sequence[str] = (),
        weights: WeightsMode = "resident",
        cache: ExampleStore | None = None,
        *,
        carries_tangents: bool = True,
    ) -> None:
        self.manifest = prepared.manifest
        self._carries_tangents = carries_tangents
        self._prepared = prepared
        self._engine = engine
        self._streams, self._packs = weights == "streamed", weights == "packed"
        self.first_trained = first_segment(prepared.manifest, tuple(trained))
        self._cache = cache
        self.observe: Callable[[Sequence[Flow]], None] | None = None
        self.weights_read_bytes = 0
        self.draws_run = self.draws_skipped = 0
        self._shared: dict[str, LoadedProgram] = {}
        self._mapped: dict[int, MappedWeights] = {}
        self._ranked = ranked_inputs(self.manifest)
        self._head = PooledHead(self.manifest) if self.manifest.head_blocks else None
        self._end = len(self.manifest.segments_run)
        programs = [self._program_of(i) for i in range(len(self.manifest.segments_run))]
        self._stages = [self._stage(i, programs[i], programs[i + 1 :]) for i in range(len(programs))]
        for i in waiting_segments(self.manifest, tuple(trained), prepared.prepared.arithmetic):
            primal = self.manifest.programs[self.manifest.segments[i].primal]
            if i < len(programs) and primal is not programs[i]:
                self._stages[i] = replace(self._stages[i], primal=self._stage(i, primal, programs[i + 1 :]))

    @property
    def arithmetic(self) -> Arithmetic:
        """Arithmetic that the package is prepared in."""
        return self._prepared.prepared.arithmetic

    def leave_at(self, block: int | None) -> None:
        """Have sweeps end behind a block from now on, and the head read that block; None for what the manifest says.

        Args:
            block: number of a block of those that run; the manifest's head must read one block.
        """
        self._end = len(self._stages) if block is None else block + 1
        if block is not None or self.manifest.head_blocks:
            self._head = PooledHead(self.manifest, () if block is None else (block,))

    def sweep(
        self,
        values: Values,
        micro_batches: Sequence[Batch],
        tangents: Sequence[Mapping[str, FloatArray]] | None = None,
        rows: Sequence[Sequence[int]] | None = None,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> Sweep:
        """Run all segments over a batch.

        Args:
            values: values of all slices, by flat name.
            micro_batches: the batch, cut into groups that are padded alike.
            tangents: the trained slices' tangents for each micro-batch, (K, b, *s) by flat name. Slices of dual
                segments that are not named get zeros.
            rows: each micro-batch's rows among the device's examples, by which the prefix cache names them; None uses
                no cache.
            begun: for each micro-batch, how many of the K draws, counted from the first, have begun in each segment:
                their tangents are not zero there or before. None carries all of them from the first trained slice on.

        Returns:
            Results for all examples, in the order of the micro-batches.
        """
        flows = self._begin(values, micro_batches, rows)
        self._run(self._stages[self.first_trained or 0 : self._end], flows, values, tangents, begun)
        if self._head is not None:
            for flow in flows:
                self._head.classify(flow, values)
        for flow, given in zip(flows, tangents or (), strict=bool(tangents)):
            for tangent in given.values():
                _carry(flow, "loss", tangent.shape[0])
        return swept(flows)

    def sweep_until(
        self, values: Values, batch: Batch, exits: Sequence[int], enough: Callable[[Sweep], bool]
    ) -> tuple[Sweep, int]:
        """Run a batch from exit to exit, and leave at the first whose outputs are enough, or at the last.

        Args:
            values: values of all slices, by flat name.
            batch: texts, padded alike.
            exits: numbers of blocks, ascending, at least one.
            enough: whether outputs are enough.

        Returns:
            The outputs, and the block behind which the batch left.
        """
        flow: Flow = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
        }
        done = 0
        for block in exits:
            self.leave_at(block)
            self._run(self._stages[done : self._end], [flow], values)
            done = self._end
            if self._head is None:
                raise PackageError(f"package {self.manifest.name} has no head that reads a block")
            self._head.classify(flow, values)
            sweep = swept([flow])
            if enough(sweep):
                break
        return sweep, block

    def _begin(
        self, values: Values, micro_batches: Sequence[Batch], rows: Sequence[Sequence[int]] | None
    ) -> list[Flow]:
        """The values of each micro-batch after the segments before the first trained slice."""
        flows: list[Flow] = [
            {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "labels": b.labels}
            for b in micro_batches
        ]
        prefix = self._stages[: self.first_trained or 0]
        if self._cache is None or rows is None:
            self._run(prefix, flows, values)
            return flows
        return self._run_prefix(self._cache, prefix, flows, values, rows)

    def _run(
        self,
        stages: Sequence[Stage],
        flows: Sequence[Flow],
        values: Values,
        tangents: Sequence[Mapping[str, FloatArray]] | None = None,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Run some segments over all micro-batches. Each flow ends with the values that are needed later."""
        for stage, following in zip_longest(stages, stages[1:]):
            self._run_stage(stage, flows, values, tangents, following, begun)

    def _run_stage(
        self,
        stage: Stage,
        flows: Sequence[Flow],
        values: Values,
        tangents: Sequence[Mapping[str, FloatArray]] | None,
        following: Stage | None,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Run one segment over all micro-batches.

        Where weights are streamed, the next segment's are read ahead meanwhile.
        """
        if self._streams and following is not None and following.weights is not stage.weights:
            following.weights.prefetch()
        dual = stage.loaded or self._load(stage.program, stage.variant, stage.weights)
        for number, flow in enumerate(flows):
            given = tangents[number] if tangents is not None else {}
            running, loaded = stage, dual
            if given:
                draws, examples = next(iter(given.values())).shape[:2]
                count = draws if begun is None else begun[number][stage.index]
                if count == 0 and stage.primal is not None and stage.primal.loaded is not None:
                    running, loaded = stage.primal, stage.primal.loaded
                else:
                    count = max(1, count)
                    if HIDDEN + DOT in stage.program.inputs:
                        _carry(flow, HIDDEN, count)
                given = {name: tangent[:count] for name, tangent in given.items()} if count else {}
                self.draws_run += count * examples
                self.draws_skipped += (draws - count) * examples
            for name, rows in running.variant.gathered.items():
                running.weights.gather(name, flow[rows])
            inputs = self._inputs(running, flow, values, given)
            outputs = (
                run_in_chunks(loaded.run, inputs, HEAD_TOKENS) if stage.by_tokens else loaded.run(inputs)
            )
            running.weights.drop_rows()
            for name in [name for name in flow if name not in stage.needed_later]:
                del flow[name]
            flow.update(outputs)
            if self._head is not None and HIDDEN in outputs:
                self._head.tap(stage.index, flow)
        self.weights_read_bytes += stage.weight_bytes
        if self.observe is not None:
            self.observe(self._waiting(flows))
        if self._streams and (following is None or following.weights is not stage.weights):
            stage.weights.release()

    def _waiting(self, flows: Sequence[Flow]) -> Sequence[Flow]:
        """All values that wait between segments."""
        return flows

    def _run_prefix(
        self,
        cache: ExampleStore,
        stages: Sequence[Stage],
        flows: Sequence[Flow],
        values: Values,
        rows: Sequence[Sequence[int]],
    ) -> list[Flow]:
        """Run the segments before the first trained slice, computing only the examples that the cache does not have.

        Besides the hidden states, the first segment may give values that all examples of a batch share (masks, rotary
        tables). They cannot be kept example by example, so the embedding runs again for the whole batch, which costs
        little.
        """
        kept = stages[-1].needed_later
        of_batch = frozenset(stages[0].program.outputs) - {HIDDEN}
        whole = [dict(flow) for flow in flows]
        self._run(stages[:1], whole, values)
        examples = [
            [(row, flow["input_ids"].shape[1]) for row in group]
            for flow, group in zip(flows, rows, strict=True)
        ]
        found = [[cache.load(example) for example in group] for group in examples]
        partial, places = [], []
        for number, group in enumerate(found):
            missing = [position for position, arrays in enumerate(group) if arrays is None]
            if missing:
                partial.append({name: array[missing] for name, array in flows[number].items()})
                places.append((number, missing))
        self._run(stages, partial, values)
        for flow, (number, missing) in zip(partial, places, strict=True):
            for index, position in enumerate(missing):
                arrays = {
                    name: array[index : index + 1]
                    for name, array in flow.items()
                    if name not in INPUTS and name not in of_batch
                }
                cache.store(examples[number][position], arrays)
                found[number][position] = arrays
        joined: list[Flow] = []
        for flow, made, group in zip(flows, whole, found, strict=True):
            full = {
                name: array
                for name, array in {**flow, **made}.items()
                if name in kept and (name in flow or name in of_batch)
            }
            parts = [arrays for arrays in group if arrays is not None]
            full.update({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
            joined.append(full)
        return joined

    def _program_of(self, index: int) -> Program:
        segment = self.manifest.segments[index]
        name = segment.primal
        if self._carries_tangents and self.first_trained is not None and index >= self.first_trained:
            wanted = segment.entry if index == self.first_trained else segment.dual
            if wanted is None:
                raise PackageError(f"segment {segment.name} has no program that carries tangents")
            name = wanted
        return self.manifest.programs[name]

    def _stage(self, index: int, program: Program, later: Sequence[Program]) -> Stage:
        """A segment's program with its weights; ``later`` are the programs that run after it."""
        variant = self._prepared.variant(program, packed=self._packs)
        weights = self._weights(index, variant)
        loaded: LoadedProgram | None = None
        if not variant.bound:  # one load serves every segment of this structure
            if variant.file not in self._shared:
                self._shared[variant.file] = self._load(program, variant, weights)
            loaded = self._shared[variant.file]
        elif not self._streams:
            loaded = self._load(program, variant, weights)
            weights.release()  # the engine has repacked them
        needed = frozenset(name for other in later for name in other.inputs)
        if self._head is not None:
            needed |= self._head.kept
        read = [name for name in (*variant.fed, *variant.bound) if name not in variant.gathered]
        size = sum(weights.arrays[name].nbytes for name in read)
        slice_inputs, by_tokens = self._slice_inputs(index), self._runs_by_tokens(index)
        return Stage(index, program, variant, weights, slice_inputs, needed, loaded, size, by_tokens)

    def _runs_by_tokens(self, index: int) -> bool:
        """Whether a segment runs some tokens at a time: the output layer of a language model."""
        return index == len(self.manifest.segments) - 1 and self.manifest.task == "causal_lm"

    def _weights(self, index: int, variant: Variant) -> MappedWeights:
        """A segment's weights, mapped once however many segments and programs share them."""
        owner = self.manifest.weights_owner(index)
        if owner not in self._mapped:
            self._mapped[owner] = MappedWeights(self._prepared, index, variant.gathered)
        return self._mapped[owner]

    def _load(self, program: Program, variant: Variant, weights: MappedWeights) -> LoadedProgram:
        bound = {name: weights.arrays[name] for name in variant.bound}
        return self._engine.load(self._prepared.package.path(variant.file), bound, program.outputs)

    def _inputs(
        self, stage: Stage, flow: Mapping[str, Array], values: Values, tangents: Mapping[str, FloatArray]
    ) -> dict[str, Array]:
        feeds: dict[str, Array] = {name: stage.weights.arrays[name] for name in stage.variant.fed}
        for name in stage.program.inputs:
            base = name.removesuffix(DOT)
            if name in flow:
                feeds[name] = flow[name]
            elif name in stage.slice_inputs:
                flat = stage.slice_inputs[name]
                feeds[name] = self._fed(flat, values[flat])
            elif base in stage.slice_inputs:
                flat = stage.slice_inputs[base]
                feeds[name] = self._fed(flat, _tangent(flat, values, tangents))
            else:
                raise PackageError(f"program {stage.variant.file} wants {name!r}, which nothing provides")
        return feeds

    def _fed(self, flat: str, array: FloatArray) -> FloatArray:
        """A slice tensor or its tangent as programs take it."""
        return self._ranked[flat].fed(array) if flat in self._ranked else array

    def _slice_inputs(self, index: int) -> dict[str, str]:
        """Flat tensor name for each program input that takes a tensor of the segment's slices."""
        return {
            tensor.input: key(spec.name, tensor.name)
            for spec in self.manifest.slices
            if index in spec.segments
            for tensor in spec.tensors
        }


def _tangent(name: str, values: Values, tangents: Mapping[str, FloatArray]) -> FloatArray:
    """Tangent of a slice tensor; zeros if the task does not train it."""
    if name in tangents:
        return tangents[name]
    like = next(iter(tangents.values()))
    return np.zeros((*like.shape[:2], *values[name].shape[1:]), dtype=np.float32)


def _carry(flow: Flow, name: str, draws: int) -> None:
    """Give a value's tangent so many draws: zeros for those that it does not have yet."""
    value, dotted = flow[name], name + DOT
    have = flow[dotted].shape[0] if dotted in flow else 0
    if have < draws:
        zeros = np.zeros((draws - have, *value.shape), dtype=value.dtype)
        flow[dotted] = np.concatenate([flow[dotted], zeros]) if have else zeros


def swept(flows: Sequence[Flow]) -> Sweep:
    """Collect the outputs of the last segment."""
    return Sweep(
        loss=_join(flows, "loss", 0),
        jvps=_join(flows, "loss" + DOT, 1) if "loss" + DOT in flows[0] else None,
        **{
            name: _join(flows, name, 0)
            for name in ("logits", "residual", "features", "correct")
            if name in flows[0]
        },
    )


def _join(flows: Sequence[Mapping[str, Array]], name: str, axis: int) -> Any:
    """One output of the head over all micro-batches, in the dtype that the program gives."""
    return np.concatenate([flow[name] for flow in flows], axis=axis)
