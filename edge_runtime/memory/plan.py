"""How much memory a task takes, how long its steps take, and which plan fits a cap; all from the manifest alone.

The predicted peak is a sum of resident bytes: libraries, tokenizer, engine, weights (all if they stay, the largest
segment if they pass through), the largest live set of any program, values that wait between segments, and slices. The
constants were measured over a grid of shapes (docs/decisions/0006-memory-prediction.md). This module uses no engine and
no numpy, so that agent and coordinator can call it.

Backpropagation (``Work.update``) runs primal programs forwards and adjoint programs backwards. The inputs of its
segments wait in memory or in a file; moving them to the file is a rung of its own. Zero order is inference, once or
twice a draw: its draws cost time but no memory, except for the directions themselves.

Of the plans that fit, the fastest is chosen, and its sentences say what it gives up against the fastest of all. Four
rungs leave the estimate as it is: streamed weights, layer inputs on disk, fewer examples at a time, fewer draws at a
time. Two change the work and are taken only where the caller allows it: shorter sequences, fewer slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Literal

from msgspec import UNSET, Struct
from msgspec.structs import asdict, replace

from edge_runtime.errors import CapExceededError, PackageError
from edge_runtime.figures import MIB, whole_size
from edge_runtime.package.held import moved_part
from edge_runtime.package.manifest import (
    ARITHMETICS,
    BLOCK_ARITHMETICS,
    LEVELS_SUFFIX,
    SCALES_SUFFIX,
    ZERO_POINTS_SUFFIX,
    Arithmetic,
    Axis,
    Manifest,
    Segment,
    SizeTerm,
    TensorRef,
    Variant,
)
from edge_runtime.package.prepared import Calibration
from edge_runtime.package.ranks import factor_of, rank_of
from edge_runtime.protocol.messages import Update

WeightsMode = Literal["packed", "resident", "streamed"]
#: Places where backpropagation keeps its layer inputs; forward mode has none to keep.
InputsMode = Literal["memory", "disk"]

#: Resident size of a worker that has imported its libraries and done nothing; a device that has run a task
#: reports its own figure. ExecuTorch's binding loads torch.
DEFAULT_FLOOR_BYTES, EXECUTORCH_FLOOR_BYTES = 58 << 20, 228 << 20
#: Library code in it that ran only while libraries were loaded and is given back: for good, and as the tokenizer works.
RELEASED_BYTES, RELEASED_AT_LOAD_BYTES = 2 << 20, 8 << 20
#: The same for torch, measured on one model.
EXECUTORCH_RELEASED_BYTES = 40 << 20
#: Memory that the engine sets up with its first session: operator registries and threads.
ENGINE_BYTES = 2 << 20
#: Memory of each loaded program: its graph and kernels.
PROGRAM_BYTES = 400 << 10
#: Memory of a loaded tokenizer, relative to its file, and the rest of it that is still there when the engine starts.
TOKENIZER_FACTOR, TOKENIZER_REST_BYTES = 26, 2 << 20
#: Memory of a tokenizer that stays, relative to its file; measured on MiniLM's, which takes 15.5.
KEPT_TOKENIZER_FACTOR = 17
#: Memory of matrices that the engine repacks, relative to their stored size; it includes a session for each segment.
PACKED_FACTOR: dict[Arithmetic, float] = {"block_int8": 1.5, "block_int4": 1.8}
#: The same where matrices that could be fed are packed once (``WeightsMode``); measured on MiniLM's six blocks.
PACKED_ONCE_FACTOR: dict[Arithmetic, float] = {"row_int8": 1.35}
#: Memory of tensors in the engine's arena, relative to their sum, since reused blocks leave gaps; and its first size.
ARENA_FACTOR, ARENA_BYTES = 1.55, 3 << 20
#: Memory that XNNPACK takes at run time for packed operands and temporaries, relative to the largest program's plan.
WORKSPACE_FACTOR = 0.5
#: Copies of the slices: values, their change, one gradient, and the encoded blobs in and out.
SLICE_COPIES = 5
#: Copies of what comes with the slices and does not move: values, and the blob that they came in.
HELD_COPIES = 2
FLOAT_BYTES = 4
#: Copies of one block's keys and values while a token joins them: before, the engine's result, and its copy.
CACHE_COPIES = 2
#: Number of tokens that a language model's output layer runs at a time, since its logits are the largest tensors.
HEAD_TOKENS = 16
#: Number of tokens of a prompt that run at a time: their scores against all tokens before are the largest tensors.
PROMPT_TOKENS = 64
#: Number of tokens to run at a time; more take memory and save little time.
PREFERRED_TOKENS = 256
#: Share of the cap that a plan may use; the rest is for what a prediction cannot know.
USABLE_SHARE = 0.95
#: Time of a streamed step and of one with packed weights, relative to a resident one, with weights in the page cache;
#: and seconds of each program run.
STREAMED_TIME, PACKED_TIME, RUN_SECONDS = 1.05, 0.85, 4e-4
#: Time of a block's adjoint program, relative to its primal one (docs/decisions/0014-backpropagation.md), and of a step
#: with layer inputs on disk. The disk's cost did not show there; the factor prefers memory where both fit.
ADJOINT_TIME, SPILLED_TIME = 4.0, 1.01
#: Largest number of passes of a zero-order draw.
DIFFERENCE_PASSES = 2
SHORTEST_SEQUENCE = 16
_ITEM_BYTES = {"float32": 4, "uint8": 1, "int8": 1, "int64": 8, "int32": 4, "bool": 1}


class Work(Struct, frozen=True):
    """Size of a step's work.

    Attributes:
        batch_size: number of examples of a step.
        sequence: number of tokens of the longest example.
        draws: number of directions of each example.
        slices: names of the slices that are trained as ``update`` says, a head among them only where it is perturbed;
            empty for evaluation and where the head alone is trained.
        update: way to the slices' gradient: estimated by forward mode, computed by backpropagation, or estimated by
            zero order. A planner knows nothing of ``"best"`` (:mod:`edge_runtime.memory.best_estimator`).
        sums_bytes: memory of the sums from which a head is solved in closed form; 0 where it is not.
        keeps_tokenizer: whether the tokenizer stays, because texts come while the programs are loaded.
        generates: whether text is generated, one example of up to ``sequence`` tokens, by the decode programs.
        one_slice: whether each direction moves one slice alone, so that nothing is computed of it before that slice.
        sketch_bytes: memory of the projections by which slices are sketched; 0 where they are not.
    """

    batch_size: int
    sequence: int
    draws: int
    slices: tuple[str, ...]
    update: Update = "forward"
    sums_bytes: int = 0
    keeps_tokenizer: bool = False
    generates: bool = False
    one_slice: bool = False
    sketch_bytes: int = 0


class PeakPrediction(Struct, frozen=True):
    """Predicted peak of a worker by part, in bytes.

    Attributes:
        libraries_bytes: interpreter and libraries.
        tokenizer_bytes: memory that the tokenizer's work leaves behind.
        engine_bytes: the engine, its loaded programs and the matrices it repacks.
        weights_bytes: mapped weights.
        live_bytes: largest live set of tensors of any program.
        waiting_bytes: values that wait between segments.
        slices_bytes: values, change, gradient and directions of the slices, and sums for a head in closed form.
        load_bytes: peak before the first step.
    """

    libraries_bytes: int
    tokenizer_bytes: int
    engine_bytes: int
    weights_bytes: int
    live_bytes: int
    waiting_bytes: int
    slices_bytes: int
    load_bytes: int

    @property
    def parts(self) -> dict[str, int]:
        """Parts that add up to the peak of a step, by name."""
        return {
            name.removesuffix("_bytes"): size for name, size in asdict(self).items() if name != "load_bytes"
        }

    @property
    def total_bytes(self) -> int:
        """The predicted peak."""
        return max(sum(self.parts.values()), self.load_bytes)


class ExecutionChoice(Struct, frozen=True):
    """How a step's work is done.

    Attributes:
        weights: whether weights stay in memory, packed or as they are mapped, or pass through it.
        micro_batch: number of examples that run at a time.
        draws_at_a_time: number of draws that run at a time.
        inputs: whether backpropagation keeps its layer inputs in memory or on disk.
    """

    weights: WeightsMode
    micro_batch: int
    draws_at_a_time: int
    inputs: InputsMode = "memory"


class Plan(Struct, frozen=True):
    """A work, how it is done, and what it takes.

    Attributes:
        work: size of a step's work.
        choice: execution chosen for it.
        peak: predicted peak memory.
        step_s: predicted seconds of a step; None where the machine was not measured.
        gave_up: sentences, one for each rung that the plan stands below the fastest.
        reason: which estimator was taken and why, of a work that leaves it open; else empty.
    """

    work: Work
    choice: ExecutionChoice
    peak: PeakPrediction
    step_s: float | None
    gave_up: tuple[str, ...] = ()
    reason: str = ""


class Planner:
    """Plans for one package on one machine.

    Args:
        manifest: the package's manifest, narrowed to the machine's engine by
            :meth:`edge_runtime.package.manifest.Manifest.for_engine`.
        arithmetic: arithmetic that the package is prepared in; None takes the package's first.
        floor_bytes: resident memory of an empty worker, measured on the device; 0 takes this module's constant.
        calibration: seconds measured on this machine, from which time is predicted; None compares plans by proportions.
    """

    def __init__(
        self,
        manifest: Manifest,
        arithmetic: Arithmetic | None = None,
        floor_bytes: int = 0,
        calibration: Calibration | None = None,
    ) -> None:
        self.manifest = manifest
        self.arithmetic = arithmetic or manifest.arithmetics[0]
        planned = any(v.planned_bytes for p in manifest.programs.values() for v in p.variants.values())
        self._floor_bytes = floor_bytes or (EXECUTORCH_FLOOR_BYTES if planned else DEFAULT_FLOOR_BYTES)
        self._released_bytes = EXECUTORCH_RELEASED_BYTES if planned else RELEASED_BYTES
        self._calibration = calibration

    def choose(self, work: Work, budget_bytes: int, *, may_change_work: bool = False) -> Plan:
        """The fastest plan whose predicted peak is within ``USABLE_SHARE`` of the budget.

        Args:
            work: size of a step's work.
            budget_bytes: memory that the plan may use.
            may_change_work: whether shorter sequences and fewer slices may be taken where the work as asked does not
                fit.

        Raises:
            CapExceededError: no plan fits; the message gives the smallest cap that would do, and what would fit in this
                one.
        """
        usable = int(budget_bytes * USABLE_SHARE)
        for candidate in self._works(work) if may_change_work else (work,):
            plans = [self.plan(candidate, choice) for choice in self.choices(candidate)]
            fitting = [plan for plan in plans if plan.peak.total_bytes <= usable]
            if fitting:
                best = min(fitting, key=lambda plan: self._seconds(candidate, plan.choice))
                told = (*fewer_ranks(self.manifest), *changed_work(work, candidate), *gave_up(plans[0], best))
                return replace(best, gave_up=told)
        raise self._refusal(work, budget_bytes)

    def plan(self, work: Work, choice: ExecutionChoice) -> Plan:
        """The plan that does a work in one given way."""
        seconds = self._seconds(work, choice) if self._calibration is not None else None
        return Plan(work, choice, self.predict(work, choice), seconds)

    def choices(self, work: Work) -> Iterator[ExecutionChoice]:
        """Every way to do the work that the programs' bounds allow, the fastest and largest first.

        Raises:
            PackageError: its sequences are longer than a program was planned for.
        """
        bounds = self._bounds(work)
        if work.sequence > bounds.get("sequence", work.sequence):
            raise PackageError(
                f"the programs of package {self.manifest.name} take {bounds['sequence']} tokens, the work has "
                f"{work.sequence}; ask for shorter sequences"
            )
        packs = work.keeps_tokenizer and self._packs(work)
        return choices(work, bounds.get("batch"), bounds.get("draws"), packs=packs)

    def _packs(self, work: Work) -> bool:
        """Whether the package has programs of the work with packed weights."""
        programs = [self.manifest.programs[name] for name in self.program_names(work)]
        return any(self.arithmetic in program.packed for program in programs)

    def _bounds(self, work: Work) -> dict[Axis, int]:
        """The smallest bound on each axis over all programs that the work runs."""
        least: dict[Axis, int] = {}
        for variant in self._variants(work):
            for axis, size in variant.bounds.items():
                least[axis] = min(size, least.get(axis, size))
        return least

    def planned_bytes(self, work: Work) -> int:
        """Memory that the engine plans ahead for all programs that the work loads; 0 where it allocates as it runs."""
        loaded = {variant.file: variant.planned_bytes for variant in self._variants(work)}
        return sum(loaded.values())

    def smallest(self, work: Work) -> Plan:
        """The plan with the least predicted peak."""
        return min(
            (self.plan(work, choice) for choice in self.choices(work)), key=lambda plan: plan.peak.total_bytes
        )

    def smallest_cap(self, work: Work) -> int:
        """The smallest cap under which :meth:`choose` finds a plan, in bytes, a whole number of MiB."""
        needed = self.smallest(work).peak.total_bytes / USABLE_SHARE
        return (int(needed) // MIB + 1) * MIB

    def predict(self, work: Work, choice: ExecutionChoice) -> PeakPrediction:
        """Predicted peak of a worker that does the work in the given way."""
        manifest, first = self.manifest, first_segment(self.manifest, work.slices)
        packed = choice.weights == "packed"
        programs = {variant.file for variant in self._variants(work)}
        if work.update == "forward":
            for index in waiting_segments(manifest, work.slices, self.arithmetic):
                primal = manifest.programs[manifest.segments[index].primal]
                programs.add(primal.variants[self.arithmetic].file)
        tokens = work.batch_size * work.sequence
        repacked = [repacked_bytes(each, self.arithmetic, packed=packed) for each in manifest.segments_run]
        hidden = tokens * manifest.base.hidden_size * FLOAT_BYTES * self._waiting_rows(first, work, choice)
        masks = tokens * work.sequence * FLOAT_BYTES
        # What a head over several blocks reads, its tangents, and once more as features.
        read = len(manifest.head_blocks or ()) * (2 + (choice.draws_at_a_time if work.slices else 0))
        pooled = work.batch_size * manifest.base.hidden_size * FLOAT_BYTES * read
        labels = tokens * _ITEM_BYTES["int64"] if manifest.task == "causal_lm" else 0
        moved = sum(moved_part(spec).dimensions for spec in manifest.slices) * FLOAT_BYTES
        held = sum(spec.dimensions for spec in manifest.slices) * FLOAT_BYTES - moved
        tangents = (
            sum(moved_part(manifest.slice_named(name)).dimensions for name in work.slices)
            * FLOAT_BYTES
            * _directions_kept(work)
        )
        tokenizer = manifest.files[manifest.tokenizer].bytes * TOKENIZER_FACTOR
        kept = manifest.files[manifest.tokenizer].bytes * KEPT_TOKENIZER_FACTOR if work.keeps_tokenizer else 0
        if work.generates:
            hidden += _cache_bytes(manifest, work.sequence)
        return PeakPrediction(
            libraries_bytes=self._floor_bytes - self._released_bytes,
            tokenizer_bytes=max(kept, TOKENIZER_REST_BYTES),
            engine_bytes=ENGINE_BYTES
            + PROGRAM_BYTES * len(programs)
            + self.planned_bytes(work)
            + (max(repacked) if choice.weights == "streamed" else sum(repacked)),
            weights_bytes=self._weights_bytes(choice),
            live_bytes=self._live_bytes(work, choice),
            waiting_bytes=hidden + masks + labels + pooled,
            slices_bytes=SLICE_COPIES * moved
            + HELD_COPIES * held
            + 2 * tangents
            + work.sums_bytes
            + work.sketch_bytes,
            load_bytes=self._floor_bytes + max(0, tokenizer - RELEASED_AT_LOAD_BYTES),
        )

    def spilled_bytes(self, work: Work) -> int:
        """Bytes of the layer inputs of backpropagation, which wait in memory or on disk."""
        first = first_segment(self.manifest, work.slices)
        kept = 0 if first is None else len(self.manifest.segments) - 1 - first
        return kept * work.batch_size * work.sequence * self.manifest.base.hidden_size * FLOAT_BYTES

    def program_names(self, work: Work) -> list[str]:
        """Names of the programs that a step runs, in order. Segments of one structure repeat the same name.

        Raises:
            PackageError: the package has no adjoint programs for backpropagation; or no decode programs where text is
                generated.
        """
        segments, first = self.manifest.segments_run, first_segment(self.manifest, work.slices)
        if work.generates:
            return [decode_program(self.manifest, index) for index in range(len(segments))]
        if work.update == "zero_order":
            first = None
        if work.update != "backprop" or first is None:
            return [program_name(segment, index, first) for index, segment in enumerate(segments)]
        # The head's adjoint gives the head's values too; a head over several blocks has no program.
        blocks = segments if self.manifest.head_blocks else segments[:-1]
        forwards = [segment.primal for segment in blocks]
        indices = reversed(range(first, len(segments)))
        return [*forwards, *(adjoint_program(self.manifest, index, self.arithmetic) for index in indices)]

    def _waiting_rows(self, first: int | None, work: Work, choice: ExecutionChoice) -> int:
        """Largest number of copies of the batch's hidden states that wait between segments, tangents included."""
        if first is None or work.update == "zero_order":
            return 1
        if work.update == "forward":
            return 1 + choice.draws_at_a_time
        blocks = len(self.manifest.segments_run) - (not self.manifest.head_blocks)
        return 1 + (blocks - first if choice.inputs == "memory" else 1)

    def _live_bytes(self, work: Work, choice: ExecutionChoice) -> int:
        """Largest live set of any program. Programs planned ahead count with what they take beyond their plan."""
        variants = self._variants(work)
        if self.planned_bytes(work):
            return int(WORKSPACE_FACTOR * max(variant.planned_bytes for variant in variants))
        if work.generates:
            new = min(work.sequence, PROMPT_TOKENS)
            live = max(live_bytes(variant, 1, new, work.sequence) for variant in variants)
            return int(live * ARENA_FACTOR) + ARENA_BYTES
        sequences = [work.sequence] * len(variants)
        if self.manifest.task == "causal_lm":
            # The output layer, which comes last, runs some tokens at a time.
            head = self.manifest.segments[-1]
            runs_head = {head.primal, head.entry, head.dual, head.adjoint}
            names = self.program_names(work)
            sequences = [min(work.sequence, HEAD_TOKENS) if n in runs_head else work.sequence for n in names]
        live = max(
            live_bytes(variant, choice.micro_batch, sequence, choice.draws_at_a_time)
            for variant, sequence in zip(variants, sequences, strict=True)
        )
        return int(live * ARENA_FACTOR) + ARENA_BYTES

    def _variants(self, work: Work) -> list[Variant]:
        """The programs that a step runs, in order."""
        return [self.manifest.programs[name].variants[self.arithmetic] for name in self.program_names(work)]

    def _weights_bytes(self, choice: ExecutionChoice) -> int:
        """Bytes of mapped weights: all blocks or the largest, and the part of the embedding that is mapped.

        Rows that the embedding gathers are gone before a block runs.
        """
        embedding = self.manifest.segments[0]
        owned = [
            segment
            for index, segment in enumerate(self.manifest.segments_run)
            if index and self.manifest.weights_owner(index) == index
        ]
        gathered = self.manifest.programs[embedding.primal].variants[self.arithmetic].gathered
        mapped = sum(
            stored_bytes(tensor) for name, tensor in embedding.weights.items() if name not in gathered
        )
        packed = choice.weights == "packed"
        sizes = [segment_bytes(segment, self.arithmetic, packed=packed) for segment in owned]
        return max([mapped, *sizes]) if choice.weights == "streamed" else mapped + sum(sizes)

    def _seconds(self, work: Work, choice: ExecutionChoice) -> float:
        """Predicted seconds of a step, from the calibration of one block. Without one only proportions hold."""
        measured = self._calibration or Calibration(1, PREFERRED_TOKENS, 1.0, 2.1, 4.8)
        first = first_segment(self.manifest, work.slices)
        per_draw = (measured.dual_4_s - measured.dual_1_s) / 3
        back = work.update == "backprop" and first is not None
        sweeps = 1
        if work.update == "zero_order":
            sweeps, first = DIFFERENCE_PASSES * max(1, work.draws), None
        elif first is not None and not back:
            sweeps = -(-work.draws // choice.draws_at_a_time)
        runs = -(-work.batch_size // choice.micro_batch)
        begun = begun_shares(self.manifest, work.slices) if work.one_slice else {}
        seconds = 0.0
        for index in range(1, len(self.manifest.segments_run)):
            carries = first is not None and index >= first
            block, programs = measured.primal_s, 1
            if carries and back:
                block, programs = measured.primal_s * (1 + ADJOINT_TIME), 2
            elif carries:
                draws = choice.draws_at_a_time * begun.get(index, 1.0)
                block = measured.dual_1_s + per_draw * max(0.0, draws - 1)
            seconds += block * work.batch_size * work.sequence / (measured.rows * measured.tokens)
            seconds += RUN_SECONDS * runs * programs
        seconds *= (
            sweeps * {"packed": PACKED_TIME, "resident": 1.0, "streamed": STREAMED_TIME}[choice.weights]
        )
        return seconds * (SPILLED_TIME if choice.inputs == "disk" else 1.0)

    def _works(self, work: Work) -> Iterator[Work]:
        """The work as asked, then with shorter sequences, then with fewer slices too, those nearest the head."""
        lengths = [work.sequence]
        while lengths[-1] > SHORTEST_SEQUENCE:
            lengths.append(max(SHORTEST_SEQUENCE, lengths[-1] // 2))
        ordered = sorted(work.slices, key=lambda name: self.manifest.slice_named(name).segment)
        counts = [len(ordered)]
        while counts[-1] > 1:
            counts.append(counts[-1] // 2)
        for count, length in product(counts, lengths):
            yield replace(work, sequence=length, slices=tuple(ordered[len(ordered) - count :]))

    def _refusal(self, work: Work, budget_bytes: int) -> CapExceededError:
        cap, offers = self.smallest_cap(work), []
        for candidate in self._works(work):
            if self.smallest_cap(candidate) <= budget_bytes:
                offers = list(changed_work(work, candidate))
                break
        least = {
            "forward": "streamed, one example and one draw at a time",
            "backprop": "streamed, layer inputs on disk, one example at a time",
            "zero_order": "streamed, one example at a time",
        }[work.update]
        would = f"would fit here with {' and '.join(offers)}" if offers else "nothing smaller would fit here"
        return CapExceededError(
            f"the task needs a cap of {whole_size(cap)} ({least}), the cap is {whole_size(budget_bytes)}; {would}",
            required_bytes=cap,
            cap_bytes=budget_bytes,
        )


def choices(
    work: Work, most_examples: int | None = None, most_draws: int | None = None, *, packs: bool = False
) -> Iterator[ExecutionChoice]:
    """Every way to do a work, the fastest and largest first.

    Args:
        work: size of a step's work.
        most_examples: largest number of examples at a time; None sets no limit.
        most_draws: largest number of draws at a time; None sets no limit.
        packs: whether there are programs with packed weights, and the work gains by them.
    """
    examples, together = preferred_micro_batch(work.batch_size, work.sequence), max(1, work.draws)
    sizes = _halved(min(examples, most_examples or examples))
    back = work.update == "backprop" and bool(work.slices)
    draws = [1] if back or work.update == "zero_order" else _halved(min(together, most_draws or together))
    modes: tuple[WeightsMode, ...] = (*(("packed",) if packs else ()), "resident", "streamed")
    places: tuple[InputsMode, ...] = ("memory", "disk") if back else ("memory",)
    for weights, inputs, at_a_time, micro_batch in product(modes, places, draws, sizes):
        yield ExecutionChoice(weights, micro_batch, at_a_time, inputs)


def gave_up(fastest: Plan, chosen: Plan) -> tuple[str, ...]:
    """Sentences that say what a plan gives up against the fastest one."""
    sentences = []
    if chosen.choice.weights != fastest.choice.weights:
        way = {
            "streamed": "weights pass through memory a segment at a time",
            "resident": "the engine packs weights anew for each text",
        }
        sentences.append(way[chosen.choice.weights])
    if chosen.choice.inputs != fastest.choice.inputs:
        sentences.append("layer inputs wait on disk")
    if chosen.choice.micro_batch != fastest.choice.micro_batch:
        sentences.append(
            f"{_count(chosen.choice.micro_batch, 'example')} at a time instead of {fastest.choice.micro_batch}"
        )
    if chosen.choice.draws_at_a_time != fastest.choice.draws_at_a_time:
        sentences.append(
            f"{_count(chosen.choice.draws_at_a_time, 'draw')} at a time instead of {fastest.choice.draws_at_a_time}"
        )
    return tuple(sentences)


def fewer_ranks(manifest: Manifest) -> tuple[str, ...]:
    """A sentence that says how many ranks slices have, if that is fewer than their programs take."""
    cut = [spec for spec in manifest.slices if any(tensor.fed is not UNSET for tensor in spec.tensors)]
    if not cut:
        return ()
    held = rank_of(manifest)
    return (f"slices of rank {held} instead of {round(held * factor_of(cut[0]))}",)


def changed_work(asked: Work, done: Work) -> tuple[str, ...]:
    """Sentences that say what was changed in the work itself."""
    sentences = []
    if done.sequence != asked.sequence:
        sentences.append(f"sequences of {done.sequence} tokens instead of {asked.sequence}")
    if done.slices != asked.slices:
        sentences.append(f"the {len(done.slices)} slices nearest the head instead of {len(asked.slices)}")
    return tuple(sentences)


def first_segment(manifest: Manifest, slices: tuple[str, ...]) -> int | None:
    """Index of the first segment with a trained slice beside the head; None if there is no such slice."""
    specs = [manifest.slice_named(name) for name in slices]
    return min((spec.segment for spec in specs if spec.kind != "head"), default=None)


def waiting_segments(manifest: Manifest, slices: tuple[str, ...], arithmetic: Arithmetic) -> range:
    """Segments that a draw may have to pass before it begins: those from the first trained slice to before the last's.

    There a forward sweep runs the primal program for examples none of whose draws has begun. Where the engine repacks
    weights for each program, or plans a program's memory ahead, that would cost memory: then there are none.
    """
    starts = [manifest.slice_named(name) for name in slices]
    indices = [spec.segment for spec in starts if spec.kind != "head"]
    if not indices or arithmetic in PACKED_FACTOR:
        return range(0)
    waiting = range(min(indices), max(indices))
    variants = [manifest.programs[manifest.segments[index].primal].variants[arithmetic] for index in waiting]
    return waiting if not any(variant.planned_bytes for variant in variants) else range(0)


def begun_shares(manifest: Manifest, slices: tuple[str, ...]) -> dict[int, float]:
    """Share of the draws that have begun in each block, by its segment's index, where each draw moves one slice alone.

    The blocks are those from the first trained slice on; the last segment, the head, is none.
    """
    starts = [spec.segment for spec in map(manifest.slice_named, slices) if spec.kind != "head"]
    blocks = range(min(starts, default=0), len(manifest.segments) - 1)
    return {index: sum(start <= index for start in starts) / len(slices) for index in blocks if starts}


def program_name(segment: Segment, index: int, first: int | None) -> str:
    """Name of the program that a forward sweep runs for a segment.

    :class:`edge_runtime.execution.executor.Executor` chooses it by the same rule.

    Args:
        segment: the segment.
        index: index of the segment.
        first: index of the first segment that carries tangents; None if none does.
    """
    if first is None or index < first:
        return segment.primal
    return (segment.entry if index == first else segment.dual) or segment.primal


def decode_program(manifest: Manifest, index: int) -> str:
    """Name of a segment's decode program.

    Raises:
        PackageError: the package has none; says what to do.
    """
    name = manifest.segments[index].decode
    if name is None:
        raise PackageError(
            f"package {manifest.name} has no programs that generate text; export it again with --with-generation"
        )
    return name


def _cache_bytes(manifest: Manifest, tokens: int) -> int:
    """Bytes of all cached keys and values of a text, and of the copies by which one block's grow."""
    shape, blocks = manifest.generation, len(manifest.segments) - 2
    if shape is None:
        return 0
    of_block = shape.heads * (shape.key_size + shape.value_size) * tokens * FLOAT_BYTES
    return of_block * (blocks + CACHE_COPIES)


def adjoint_program(manifest: Manifest, index: int, arithmetic: Arithmetic) -> str:
    """Name of a segment's adjoint program.

    Raises:
        PackageError: the package has none, or none in this arithmetic; says what to do.
    """
    name = manifest.segments[index].adjoint
    if name is None:
        raise PackageError(
            f"package {manifest.name} has no adjoint programs, which backpropagation runs; "
            "export it again with --with-adjoint, or train with forward gradients"
        )
    offered = manifest.programs[name].variants
    if arithmetic not in offered:
        others = " or ".join(name for name in ARITHMETICS if name in offered)
        raise PackageError(
            f"package {manifest.name} is prepared in {arithmetic}, whose products cannot be transposed; prepare it in "
            f"{others} for backpropagation, or train with forward gradients"
        )
    return name


def live_bytes(variant: Variant, batch: int, sequence: int, draws: int) -> float:
    """Bytes of the largest live set of a program at a given size: the largest value of its polynomials."""
    return max(
        (sum(_term(term, batch, sequence, draws) for term in candidate) for candidate in variant.live),
        default=0.0,
    )


def segment_bytes(segment: Segment, arithmetic: Arithmetic, *, packed: bool = False) -> int:
    """Bytes of a segment's weights as an arithmetic maps them, without matrices that the engine repacks."""
    repacked = arithmetic in BLOCK_ARITHMETICS or (packed and arithmetic in PACKED_ONCE_FACTOR)
    total = 0
    for name, tensor in segment.weights.items():
        if not _is_quantised(name, segment):
            total += stored_bytes(tensor)
        elif name.endswith(LEVELS_SUFFIX) and not repacked:
            total += matrix_numbers(name, segment) * (1 if arithmetic == "row_int8" else FLOAT_BYTES)
    return total


def matrix_numbers(levels: str, segment: Segment) -> int:
    """Number of weights in the matrix of these levels: two a byte where it has zero points."""
    four_bits = levels.removesuffix(LEVELS_SUFFIX) + ZERO_POINTS_SUFFIX in segment.weights
    return stored_bytes(segment.weights[levels]) * (2 if four_bits else 1)


def stored_bytes(tensor: TensorRef) -> int:
    """Bytes of a tensor in its file."""
    total = _ITEM_BYTES[tensor.dtype]
    for side in tensor.shape:
        total *= side
    return total


def repacked_bytes(segment: Segment, arithmetic: Arithmetic, *, packed: bool = False) -> int:
    """Bytes of the copies that the engine makes when it repacks a segment's matrices, of itself or packed once."""
    if packed and arithmetic in PACKED_ONCE_FACTOR:
        levels = [
            name for name in segment.weights if name.endswith(LEVELS_SUFFIX) and _is_quantised(name, segment)
        ]
        return int(sum(matrix_numbers(name, segment) for name in levels) * PACKED_ONCE_FACTOR[arithmetic])
    if arithmetic not in PACKED_FACTOR:
        return 0
    stored = sum(stored_bytes(t) for name, t in segment.weights.items() if _is_quantised(name, segment))
    return int(stored * PACKED_FACTOR[arithmetic])


def _is_quantised(name: str, segment: Segment) -> bool:
    """Whether a tensor holds levels, scales or zero points of a quantised matrix (not of an embedding)."""
    for suffix in (LEVELS_SUFFIX, SCALES_SUFFIX, ZERO_POINTS_SUFFIX):
        levels = segment.weights.get(name.removesuffix(suffix) + LEVELS_SUFFIX)
        if name.endswith(suffix) and levels is not None and len(levels.shape) == 3:
            return True
    return False


def preferred_micro_batch(batch_size: int, sequence: int) -> int:
    """Number of examples to run at a time where memory does not matter: about ``PREFERRED_TOKENS`` tokens."""
    return min(batch_size, max(1, PREFERRED_TOKENS // sequence))


def _directions_kept(work: Work) -> int:
    """Number of directions of its slices that a step holds. Under zero order the batch shares them."""
    return {"forward": work.draws * work.batch_size, "zero_order": work.draws, "backprop": 0}[work.update]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _halved(largest: int) -> list[int]:
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _term(term: SizeTerm, batch: int, sequence: int, draws: int) -> float:
    scale = batch**term.batch_power * sequence**term.sequence_power * draws**term.draws_power
    return float(term.coefficient * scale)
