"""Plans: which of the ways to do the work is chosen, what it gives up, and what a refusal says."""

from __future__ import annotations

import re
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.errors import CapExceededError, PackageError
from edge_runtime.execution.executor import Executor
from edge_runtime.memory import plan as module
from edge_runtime.memory.plan import (
    USABLE_SHARE,
    ExecutionChoice,
    Planner,
    Work,
    choices,
    first_segment,
    live_bytes,
    preferred_micro_batch,
    program_name,
    repacked_bytes,
    segment_bytes,
    waiting_segments,
)
from edge_runtime.package.manifest import (
    FileEntry,
    Manifest,
    Program,
    Segment,
    SizeTerm,
    SliceSpec,
    TensorRef,
    TensorSpec,
    Variant,
)
from edge_runtime.package.prepared import Calibration
from tests.edge_runtime.packages import make_manifest

MIB = 1 << 20
HIDDEN, BLOCKS, VOCABULARY = 256, 4, 20_000
#: A block of this model on some machine: 2 rows of 128 tokens.
CALIBRATION = Calibration(2, 128, 0.010, 0.021, 0.048)


def variant_with(*live: tuple[SizeTerm, ...]) -> Variant:
    return Variant("programs/block.onnx", (), live=live)


def matrix(name: str, outputs: int, inputs: int) -> dict[str, TensorRef]:
    """A quantised matrix as it is stored."""
    blocks = inputs // 32
    return {
        f"{name}_levels": TensorRef("weights/block.bin", 0, "uint8", (outputs, blocks, 32)),
        f"{name}_scales": TensorRef("weights/block.bin", 0, "float32", (outputs, blocks)),
    }


def matrix_of_four_bits(name: str, outputs: int, inputs: int) -> dict[str, TensorRef]:
    """The same in int4, with blocks of 32 inputs."""
    blocks = inputs // 32
    return {
        f"{name}_levels": TensorRef("weights/block.bin", 0, "uint8", (outputs, blocks, 16)),
        f"{name}_scales": TensorRef("weights/block.bin", 0, "float32", (outputs, blocks)),
        f"{name}_zero_points": TensorRef("weights/block.bin", 0, "uint8", (outputs, -(-blocks // 2))),
    }


def make_model() -> Manifest:
    """An encoder of four blocks of twelve matrices, 256 × 256, with one slice a block; made by hand, never run."""

    def program(*live: tuple[SizeTerm, ...]) -> Program:
        names = ("row_int8", "block_int8", "float")
        return Program(("hidden",), ("hidden",), dict.fromkeys(names, variant_with(*live)))

    row = 4.0 * HIDDEN
    table = {
        "words_levels": TensorRef("weights/block.bin", 0, "uint8", (VOCABULARY, HIDDEN)),
        "words_scales": TensorRef("weights/block.bin", 0, "float32", (VOCABULARY, HIDDEN // 32)),
    }
    block = {name: ref for number in range(12) for name, ref in matrix(f"m{number}", HIDDEN, HIDDEN).items()}
    block["norm"] = TensorRef("weights/block.bin", 0, "float32", (HIDDEN,))

    def exact(*live: tuple[SizeTerm, ...]) -> Program:
        names = ("row_int8", "float")
        return Program(("hidden",), ("hidden_bar",), dict.fromkeys(names, variant_with(*live)))

    return replace(
        make_manifest(),
        sequence_limit=512,
        base=replace(make_manifest().base, hidden_size=HIDDEN, quantisation="int8"),
        files={**make_manifest().files, "tokenizer.json": FileEntry(500_000, "0" * 64)},
        programs={
            "embedding": program((SizeTerm(3 * row, 1, 1),)),
            "primal": program((SizeTerm(8 * row, 1, 1), SizeTerm(16.0, 1, 2))),
            "entry": program((SizeTerm(8 * row, 1, 1), SizeTerm(8 * row, 1, 1, 1), SizeTerm(16.0, 1, 2, 1))),
            "dual": program((SizeTerm(8 * row, 1, 1), SizeTerm(9 * row, 1, 1, 1), SizeTerm(16.0, 1, 2, 1))),
            "head": program((SizeTerm(row, 1, 1),)),
            "adjoint": exact((SizeTerm(20 * row, 1, 1), SizeTerm(40.0, 1, 2))),
            "head_adjoint": exact((SizeTerm(3 * row, 1, 1),)),
        },
        segments=(
            Segment("embedding", "embedding", None, None, table),
            *(Segment(f"block_{i}", "primal", "entry", "dual", block, "adjoint") for i in range(BLOCKS)),
            Segment("head", "head", None, "head", {}, "head_adjoint"),
        ),
        slices=(
            *(
                SliceSpec(f"s{i}", "lora_xs", (i + 1,), "query", (TensorSpec("core", (1, 4, 4), "core"),))
                for i in range(BLOCKS)
            ),
            SliceSpec("head", "head", (BLOCKS + 1,), "head", (TensorSpec("weight", (10, HIDDEN), "head"),)),
        ),
    )


MODEL = make_model()
ALL = tuple(f"s{i}" for i in range(BLOCKS))
WORK = st.builds(
    Work,
    batch_size=st.integers(1, 64),
    sequence=st.integers(1, 512),
    draws=st.integers(0, 64),
    slices=st.sets(st.sampled_from(ALL)).map(lambda names: tuple(sorted(names))),
    update=st.sampled_from(["forward", "backprop", "zero_order"]),
)
PLANNERS = st.builds(
    lambda arithmetic, floor, calibration: Planner(MODEL, arithmetic, floor, calibration),
    st.sampled_from(["row_int8", "float"]),
    st.sampled_from([0, 40 * MIB, 90 * MIB]),
    st.sampled_from([None, CALIBRATION]),
)
PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


def test_a_live_set_is_the_largest_polynomial_at_a_size() -> None:
    """Which polynomial is largest depends on the size: 128·B·T against 96·B·T + 64·K·B."""
    variant = variant_with((SizeTerm(128, 1, 1),), (SizeTerm(96, 1, 1), SizeTerm(64, 1, 0, 1)))
    assert live_bytes(variant, 1, 1, 1) == 160
    assert live_bytes(variant, 1, 10, 1) == 1280
    assert live_bytes(variant, 3, 10, 8) == 3 * (960 + 512)
    assert live_bytes(variant_with(), 1, 1, 1) == 0


def test_weights_by_arithmetic() -> None:
    """A matrix of 256 × 256 maps as 1 byte a number in row_int8, 4 in float, and is repacked in block_int8."""
    segment = Segment(
        "s", "p", None, None, {**matrix("m", 256, 256), "b": TensorRef("f", 0, "float32", (3,))}
    )
    numbers = 256 * 256
    assert segment_bytes(segment, "row_int8") == numbers + 12
    assert segment_bytes(segment, "float") == 4 * numbers + 12
    assert segment_bytes(segment, "block_int8") == 12
    assert repacked_bytes(segment, "row_int8") == repacked_bytes(segment, "float") == 0
    assert repacked_bytes(segment, "block_int8") == int(
        (numbers + 4 * numbers // 32) * module.PACKED_FACTOR["block_int8"]
    )


def test_weights_of_four_bits_by_arithmetic() -> None:
    """They map as many numbers as those of eight bits; what is repacked is levels, scales and zero points."""
    bias = {"b": TensorRef("f", 0, "float32", (3,))}
    segment = Segment("s", "p", None, None, {**matrix_of_four_bits("m", 256, 96), **bias})
    numbers = 256 * 96
    assert segment_bytes(segment, "row_int8") == numbers + 12
    assert segment_bytes(segment, "float") == 4 * numbers + 12
    assert segment_bytes(segment, "block_int4") == 12
    stored = numbers // 2 + 256 * 3 * 4 + 256 * 2
    assert repacked_bytes(segment, "block_int4") == int(stored * module.PACKED_FACTOR["block_int4"])


def test_weights_are_packed_where_texts_come_one_by_one() -> None:
    """A worker that answers has its matrices packed, if package and cap allow it; one that trains has not."""
    primal = MODEL.programs["primal"]
    packing = replace(primal, packed={"row_int8": replace(variant_with(), file="packed.onnx")})
    planner = Planner(replace(MODEL, programs={**MODEL.programs, "primal": packing}), "row_int8")
    asks, trains = Work(1, 64, 0, (), keeps_tokenizer=True), Work(1, 64, 1, ALL)
    ample = planner.choose(asks, 1 << 30)
    assert (ample.choice.weights, ample.gave_up) == ("packed", ())
    assert planner.choose(trains, 1 << 30).choice.weights == "resident"
    assert Planner(MODEL, "row_int8").choose(asks, 1 << 30).choice.weights == "resident"
    fed = planner.plan(asks, ExecutionChoice("resident", 1, 1)).peak
    matrices = 12 * HIDDEN * HIDDEN  # the blocks share them where they are mapped, and each packs its own
    assert fed.weights_bytes - ample.peak.weights_bytes == matrices
    assert ample.peak.engine_bytes - fed.engine_bytes == BLOCKS * int(1.35 * matrices)
    less = planner.choose(asks, int((ample.peak.total_bytes - 1) / 0.95))
    assert less.choice.weights == "resident"
    assert less.gave_up == ("the engine packs weights anew for each text",)


def test_an_embedding_is_never_repacked() -> None:
    """Its levels have two axes, not three: every arithmetic reads its rows as they are stored."""
    for arithmetic in ("row_int8", "block_int8", "float"):
        assert segment_bytes(MODEL.segments[0], arithmetic) == VOCABULARY * (HIDDEN + HIDDEN // 32 * 4)
        assert repacked_bytes(MODEL.segments[0], arithmetic) == 0


@pytest.mark.parametrize("trained", [[], ["0.attention.self.query"], ["1.attention.self.value"]])
def test_the_plan_names_the_programs_that_run(exported, float_prepared, trained: list[str]) -> None:
    """Planner and executor choose the same program for each segment."""
    from edge_runtime.engines.onnxruntime_engine import OnnxEngine

    names = tuple(f"encoder.layer.{name}" for name in trained)
    manifest, first = exported.package.manifest, first_segment(exported.package.manifest, names)
    executor = Executor(float_prepared, OnnxEngine(), names)
    assert executor.first_trained == first
    planned = [
        manifest.programs[program_name(segment, index, first)]
        for index, segment in enumerate(manifest.segments)
    ]
    assert planned == [stage.program for stage in executor._stages]


def test_a_segment_without_dual_falls_back_to_primal() -> None:
    """A segment that has no program with tangents is planned with its primal one."""
    assert program_name(Segment("s", "p", None, None, {}), 3, 1) == "p"


def test_zero_order_is_planned_as_inference() -> None:
    """It runs primal programs alone; draws add their directions, once a batch, and twice their passes."""
    planner = Planner(MODEL, "float", calibration=CALIBRATION)
    choice = ExecutionChoice("resident", 4, 1)
    evaluation = planner.plan(Work(8, 64, 0, ()), choice)
    for draws in (1, 20):
        work = Work(8, 64, draws, (*ALL, "head"), "zero_order")
        assert set(planner.program_names(work)) == {"embedding", "primal", "head"}
        assert {candidate.draws_at_a_time for candidate in choices(work)} == {1}
        plan = planner.plan(work, choice)
        numbers = 4 * 16 + 10 * HIDDEN
        assert plan.peak.slices_bytes - evaluation.peak.slices_bytes == 2 * 4 * numbers * draws
        assert replace(plan.peak, slices_bytes=0) == replace(evaluation.peak, slices_bytes=0)
        assert plan.step_s == pytest.approx(2 * draws * evaluation.step_s)
    with pytest.raises(CapExceededError, match="streamed, one example at a time"):
        planner.choose(work, 10 * MIB)


def test_a_perturbed_head_takes_the_memory_of_its_directions() -> None:
    """Named among the slices it adds its directions to the plan, of each example and draw, and no program."""
    planner, choice = Planner(MODEL, "float"), ExecutionChoice("resident", 4, 4)
    exact, perturbed = Work(8, 64, 4, ALL), Work(8, 64, 4, (*ALL, "head"))
    assert planner.program_names(exact) == planner.program_names(perturbed)
    more = planner.predict(perturbed, choice).slices_bytes - planner.predict(exact, choice).slices_bytes
    assert more == 2 * 4 * 10 * HIDDEN * 8 * 4


def test_the_head_alone_moves_no_segment() -> None:
    """The first segment with tangents is that of the earliest slice; the head's gradient needs none."""
    assert first_segment(MODEL, ("s3", "s1", "head")) == 2
    assert first_segment(MODEL, ("head",)) is first_segment(MODEL, ()) is None


def test_the_ladder_of_choices() -> None:
    """From all weights resident and the preferred group down to one example and one draw, streamed; each once."""
    ladder = list(choices(Work(8, 64, 4, ALL)))
    assert ladder[0] == ExecutionChoice("resident", 4, 4)
    assert ladder[-1] == ExecutionChoice("streamed", 1, 1)
    assert len(set(map(str, ladder))) == len(ladder) == 2 * 3 * 3
    modes = [choice.weights for choice in ladder]
    assert modes == sorted(modes)
    assert [c.micro_batch for c in ladder[:3]] == [4, 2, 1]
    assert [c.draws_at_a_time for c in ladder[:9]] == [4] * 3 + [2] * 3 + [1] * 3


@PROPERTY
@given(work=WORK)
def test_a_ladder_starts_with_the_most_and_ends_with_the_least(work: Work) -> None:
    """No choice takes more at a time than the first or less than the last, and none exceeds the work."""
    ladder = list(choices(work))
    back = work.update == "backprop" and work.slices
    assert ladder[-1] == ExecutionChoice("streamed", 1, 1, "disk" if back else "memory")
    assert ladder[0].micro_batch == preferred_micro_batch(work.batch_size, work.sequence) <= work.batch_size
    for choice in ladder:
        assert 1 <= choice.micro_batch <= ladder[0].micro_batch
        assert 1 <= choice.draws_at_a_time <= max(1, work.draws)


def test_what_is_given_up_is_said() -> None:
    """Under ever smaller caps a plan gives up ever more; each sentence names what and how much."""
    planner, work = Planner(MODEL, "float", calibration=CALIBRATION), Work(8, 64, 4, ALL)
    fastest = planner.choose(work, 4096 * MIB)
    assert fastest.gave_up == ()
    assert fastest.choice == ExecutionChoice("resident", 4, 4)
    smallest = planner.choose(work, planner.smallest_cap(work))
    assert smallest.choice == ExecutionChoice("streamed", 1, 1)
    assert smallest.gave_up == (
        "weights pass through memory a segment at a time",
        "1 example at a time instead of 4",
        "1 draw at a time instead of 4",
    )
    seen = [
        planner.choose(work, cap * MIB).gave_up for cap in range(planner.smallest_cap(work) >> 20, 400, 2)
    ]
    assert 2 < len(set(seen)) <= 18


def test_work_is_changed_only_where_the_caller_says_so() -> None:
    """Below the smallest cap: refused; or, asked for, shorter sequences first and then the slices nearest the head."""
    planner, work = Planner(MODEL, "row_int8", calibration=CALIBRATION), Work(4, 512, 4, ALL)
    cap = planner.smallest_cap(work) - MIB
    with pytest.raises(CapExceededError):
        planner.choose(work, cap)
    changed = planner.choose(work, cap, may_change_work=True)
    assert changed.work == replace(work, sequence=256)
    assert changed.gave_up[0] == "sequences of 256 tokens instead of 512"
    least = planner.smallest_cap(replace(work, sequence=16))
    fewer = replace(work, sequence=16, slices=("s3",))
    assert planner.smallest_cap(fewer) <= least
    sentences = [
        plan.gave_up
        for cap in range(planner.smallest_cap(fewer), least, MIB)
        if (plan := planner.choose(work, cap, may_change_work=True))
    ]
    for given_up in sentences:
        assert re.fullmatch(r"the [12] slices nearest the head instead of 4", given_up[1])


def test_a_refusal_says_what_would_do() -> None:
    """The message has the smallest cap, the cap, and the first smaller work that would fit."""
    planner, work = Planner(MODEL, "row_int8", floor_bytes=40 * MIB), Work(4, 512, 4, ALL)
    needed = planner.smallest_cap(work)
    with pytest.raises(CapExceededError) as caught:
        planner.choose(work, needed - MIB)
    assert str(caught.value) == (
        f"the task needs a cap of {needed >> 20} MiB (streamed, one example and one draw at a time), the cap is "
        f"{(needed >> 20) - 1} MiB; would fit here with sequences of 256 tokens instead of 512"
    )
    assert (caught.value.required_bytes, caught.value.cap_bytes) == (needed, needed - MIB)
    with pytest.raises(CapExceededError, match="the cap is 1 MiB; nothing smaller would fit here"):
        planner.choose(work, MIB)


@PROPERTY
@given(planner=PLANNERS, work=WORK)
def test_the_smallest_cap_is_tight(planner: Planner, work: Work) -> None:
    """A plan is found at the smallest cap, and none a MiB below it."""
    cap = planner.smallest_cap(work)
    assert cap % MIB == 0
    plan = planner.choose(work, cap)
    assert plan.peak.total_bytes <= cap * USABLE_SHARE
    with pytest.raises(CapExceededError) as caught:
        planner.choose(work, cap - MIB)
    assert caught.value.required_bytes == cap


@PROPERTY
@given(planner=PLANNERS, work=WORK, spare=st.integers(0, 512))
def test_the_fastest_that_fits_is_chosen(planner: Planner, work: Work, spare: int) -> None:
    """The plan stays within the usable share, and no other that does is predicted to be faster."""
    budget = planner.smallest_cap(work) + spare * MIB
    plan = planner.choose(work, budget)
    assert plan.work == work
    assert plan.peak.total_bytes <= budget * USABLE_SHARE
    for choice in choices(work):
        other = planner.plan(work, choice)
        if other.peak.total_bytes <= budget * USABLE_SHARE:
            assert planner._seconds(work, plan.choice) <= planner._seconds(work, choice)
    assert (plan.step_s is None) == (planner._calibration is None)


@PROPERTY
@given(planner=PLANNERS, work=WORK, spare=st.tuples(st.integers(0, 512), st.integers(0, 512)))
def test_a_larger_cap_never_means_a_slower_plan(planner: Planner, work: Work, spare: tuple[int, int]) -> None:
    """With more memory a step is predicted to take no longer."""
    low, high = (planner.choose(work, planner.smallest_cap(work) + each * MIB) for each in sorted(spare))
    assert planner._seconds(work, high.choice) <= planner._seconds(work, low.choice)


@PROPERTY
@given(planner=PLANNERS, work=WORK, field=st.sampled_from(["batch_size", "sequence", "draws"]))
def test_more_work_never_takes_less(planner: Planner, work: Work, field: str) -> None:
    """Done in the same way, the prediction grows with batch, sequence and draws; its parts add up."""
    choice = ExecutionChoice("resident", 1, 1)
    less = planner.predict(work, choice)
    more = planner.predict(replace(work, **{field: getattr(work, field) + 1}), choice)
    assert less.total_bytes <= more.total_bytes
    assert less.total_bytes == max(sum(less.parts.values()), less.load_bytes)
    assert all(size >= 0 for size in less.parts.values())


@PROPERTY
@given(planner=PLANNERS, work=WORK)
def test_each_rung_takes_less_memory(planner: Planner, work: Work) -> None:
    """Streaming, and fewer examples or draws at a time, never take more than what they stand below."""
    plans = [planner.plan(work, choice) for choice in choices(work)]
    for above, below in product(plans, plans):
        more, less = above.choice, below.choice
        if (
            less.weights in (more.weights, "streamed")
            and less.micro_batch <= more.micro_batch
            and less.draws_at_a_time <= more.draws_at_a_time
            and less.inputs in (more.inputs, "disk")
        ):
            assert below.peak.total_bytes <= above.peak.total_bytes


def test_the_share_of_the_cap_that_plans_use(monkeypatch) -> None:
    """What is left unused of a cap is the share set aside: with twice as much needed, the smallest cap doubles."""
    planner, work = Planner(MODEL), Work(4, 64, 2, ALL)
    whole = planner.smallest(work).peak.total_bytes
    for share in (1.0, 0.5):
        monkeypatch.setattr(module, "USABLE_SHARE", share)
        assert whole / share < planner.smallest_cap(work) <= whole / share + MIB


def test_blocks_that_share_their_weights_hold_them_once() -> None:
    """A block that is called again, as ALBERT's is, adds no resident weights."""
    work = Work(4, 64, 2, ("s3",))
    resident = []
    for calls in (1, 6):
        segments = (MODEL.segments[0], *MODEL.segments[1:2] * calls, MODEL.segments[-1])
        manifest = replace(MODEL, segments=segments, slices=(*MODEL.slices[3:],))
        resident.append(
            Planner(manifest, "row_int8").predict(work, ExecutionChoice("resident", 1, 1)).weights_bytes
        )
    assert resident[0] == resident[1]


def test_streaming_holds_one_block() -> None:
    """Resident weights grow with the number of blocks, streamed ones do not."""
    work = Work(4, 64, 2, ("s3",))

    def weights(blocks: int, mode: module.WeightsMode) -> int:
        own = [
            {
                name: replace(tensor, file=f"weights/{number}.bin")
                for name, tensor in MODEL.segments[1].weights.items()
            }
            for number in range(blocks)
        ]
        middle = [replace(MODEL.segments[1], weights=weights) for weights in own]
        segments = (MODEL.segments[0], *middle, MODEL.segments[-1])
        manifest = replace(MODEL, segments=segments, slices=(*MODEL.slices[3:],))
        return Planner(manifest, "row_int8").predict(work, ExecutionChoice(mode, 1, 1)).weights_bytes

    block = segment_bytes(MODEL.segments[1], "row_int8")
    resident = [weights(blocks, "resident") for blocks in (4, 5, 6)]
    assert [more - less for less, more in pairwise(resident)] == [block, block]
    assert len({weights(blocks, "streamed") for blocks in (4, 5, 6)}) == 1
    mapped = sum(module.stored_bytes(tensor) for tensor in MODEL.segments[0].weights.values())
    assert resident[0] == mapped + 4 * block
    assert weights(4, "streamed") == max(mapped, block)


def test_the_device_own_floor_replaces_the_constant() -> None:
    """A measured floor moves the prediction by exactly its difference."""
    work, choice = Work(4, 16, 2, ALL), ExecutionChoice("resident", 4, 2)
    low, high = (Planner(MODEL, floor_bytes=floor * MIB).predict(work, choice) for floor in (40, 90))
    assert high.total_bytes - low.total_bytes == 50 * MIB


def test_a_large_tokenizer_can_be_the_peak() -> None:
    """Loading a tokenizer file of 9 MB takes more than a small step after it."""
    files = {**MODEL.files, "tokenizer.json": FileEntry(9_000_000, "0" * 64)}
    peak = Planner(replace(MODEL, files=files)).predict(
        Work(1, 16, 1, ("s3",)), ExecutionChoice("streamed", 1, 1)
    )
    assert peak.total_bytes == peak.load_bytes > sum(peak.parts.values())


def test_tangents_are_counted_only_where_they_run() -> None:
    """Evaluation takes no more for draws at a time; training does."""
    for slices, grows in (((), False), (ALL, True)):
        few, many = (
            Planner(MODEL).predict(Work(4, 16, k, slices), ExecutionChoice("resident", 4, k)).waiting_bytes
            for k in (1, 9)
        )
        assert (many > few) == grows


def test_seconds_follow_the_calibration() -> None:
    """Four draws at once cost what a block was measured to take; one at a time they cost four sweeps."""
    planner = Planner(MODEL, "row_int8", calibration=CALIBRATION)
    work = Work(2, 128, 4, ALL)
    together = planner.plan(work, ExecutionChoice("resident", 2, 4)).step_s
    apart = planner.plan(work, ExecutionChoice("resident", 2, 1)).step_s
    assert together is not None
    assert apart is not None
    blocks = BLOCKS + 1  # the head counts as one
    assert together == pytest.approx(blocks * (0.048 + module.RUN_SECONDS))
    assert apart == pytest.approx(4 * blocks * (0.021 + module.RUN_SECONDS))


def test_layer_inputs_wait_for_the_way_back() -> None:
    """In memory, backpropagation keeps an input for every block from the first slice on; on disk it keeps one."""
    state = 4 * 64 * HIDDEN * module.FLOAT_BYTES
    masks = 4 * 64 * 64 * module.FLOAT_BYTES

    def waiting(inputs: module.InputsMode, *slices: str) -> int:
        work = Work(4, 64, 1, slices, "backprop")
        return Planner(MODEL).predict(work, ExecutionChoice("resident", 4, 1, inputs)).waiting_bytes - masks

    assert waiting("memory", *ALL) == (1 + BLOCKS) * state
    assert waiting("memory", "s3") == 2 * state
    assert waiting("disk", *ALL) == waiting("disk", "s3") == 2 * state


def test_the_ladder_of_backpropagation() -> None:
    """One draw; layer inputs go to disk before fewer examples run at a time; forward mode has no such rung."""
    ladder = list(choices(Work(4, 64, 3, ALL, "backprop")))
    assert ladder[0] == ExecutionChoice("resident", 4, 1, "memory")
    assert ladder[3] == ExecutionChoice("resident", 4, 1, "disk")
    assert ladder[-1] == ExecutionChoice("streamed", 1, 1, "disk")
    assert {choice.draws_at_a_time for choice in ladder} == {1}
    assert {choice.inputs for choice in choices(Work(4, 64, 3, ALL))} == {"memory"}


def test_a_small_cap_sends_layer_inputs_to_disk() -> None:
    """Just above the smallest cap the plan says so, and one MiB less is refused with the words of backpropagation."""
    planner, work = Planner(MODEL, "row_int8"), Work(64, 512, 1, ALL, "backprop")
    cap = planner.smallest_cap(work)
    plan = planner.choose(work, cap)
    assert plan.choice.inputs == "disk"
    assert "layer inputs wait on disk" in plan.gave_up
    with pytest.raises(CapExceededError, match=r"streamed, layer inputs on disk, one example at a time"):
        planner.choose(work, cap - MIB)


def test_draws_of_one_slice_take_no_time_before_it() -> None:
    """Of 8 draws over slices in blocks 2 and 3, 4 are run in block 2 and 8 in block 3; memory stays as it is."""
    planner = Planner(MODEL, "row_int8", calibration=CALIBRATION)
    work, choice = Work(2, 128, 8, ("s2", "s3")), ExecutionChoice("resident", 2, 8)
    every, one = planner.plan(work, choice), planner.plan(replace(work, one_slice=True), choice)
    per_draw = (CALIBRATION.dual_4_s - CALIBRATION.dual_1_s) / 3
    assert every.step_s - one.step_s == pytest.approx(4 * per_draw)
    assert one.peak == every.peak
    assert waiting_segments(MODEL, ("s2", "s3"), "row_int8") == range(3, 4)
    assert waiting_segments(MODEL, ("s2", "s3"), "block_int8") == range(0)


def test_backpropagation_runs_its_own_programs() -> None:
    """Primal programs up to the head, then adjoints from the head back to the first slice; none where none is."""
    planner = Planner(MODEL, "row_int8")
    names = planner.program_names(Work(1, 16, 1, ("s2", "s3"), "backprop"))
    assert names == ["embedding", *["primal"] * BLOCKS, "head_adjoint", "adjoint", "adjoint"]
    head_alone = Work(1, 16, 1, (), "backprop")
    assert planner.program_names(head_alone) == ["embedding", *["primal"] * BLOCKS, "head"]


def test_backpropagation_is_refused_where_it_cannot_run() -> None:
    """Without adjoint programs, or in an arithmetic that has none, the planner says what to do."""
    work = Work(1, 16, 1, ALL, "backprop")
    with pytest.raises(PackageError, match=r"block_int8.*prepare it in row_int8 or float"):
        Planner(MODEL, "block_int8").smallest_cap(work)
    without = replace(MODEL, segments=tuple(replace(each, adjoint=None) for each in MODEL.segments))
    with pytest.raises(PackageError, match=r"no adjoint programs.*--with-adjoint"):
        Planner(without).smallest_cap(work)


def test_what_no_device_moves_takes_two_copies() -> None:
    """Rows have directions and changes of their own size; the weight's own change is held once, with its blob."""
    tensors = {"rows": (1, 4, 50), "place": (1, 60, 4), "moved": (1, 60, 50)}
    rows = SliceSpec("r", "rows", (1,), "r", tuple(TensorSpec(n, shape, n) for n, shape in tensors.items()))
    core = SliceSpec("r", "lora_xs", (1,), "r", (TensorSpec("core", (1, 4, 50), "core"),))
    peaks = []
    for spec in (rows, core):
        planner = Planner(replace(MODEL, slices=(spec,)), "float")
        work = Work(4, 16, 3, ("r",))
        peaks.append(planner.predict(work, ExecutionChoice("resident", 4, 3)).slices_bytes)
    assert peaks[0] - peaks[1] == 2 * 4 * (60 * 4 + 60 * 50)


def test_projections_count_where_slices_are_sketched() -> None:
    """A step that sketches has the projections' memory on top."""
    planner, choice = Planner(MODEL, "float"), ExecutionChoice("resident", 4, 3)
    plain, sketched = (Work(4, 16, 3, ALL, sketch_bytes=size) for size in (0, 12_345))
    assert (
        planner.predict(sketched, choice).slices_bytes - planner.predict(plain, choice).slices_bytes == 12_345
    )
