"""From a worker's answer to the figures of a memory report: step time, growth, bins, phases, tensors.

These are pure functions of the measured figures; nothing here runs anything. Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

from msgspec.structs import replace

from edge_runtime.memory.plan import PeakPrediction, Plan, Planner, live_bytes
from edge_runtime.package.manifest import Manifest, PeakTensor, Variant
from edge_runtime.profile.document import Bin, Growth, LiveTensor, PhasePeak
from edge_runtime.worker.jobs import BinMeasure, StepMeasure

#: Largest number of warm-up steps, which are a fifth of all. The first steps meet every length of batch for the first
#: time and set up what stays, so they are no measure of the rest.
MOST_WARM_UP_STEPS = 20
#: Number of steps after the warm-up that a leak check needs.
FEWEST_CHECKED_STEPS = 20
#: Growth that counts as a leak: above four pages of 4 KiB a step, 16 MiB in a thousand steps. A leaked hidden state of
#: one example (128 tokens, 384 wide) is twelve times as much.
LEAK_BYTES_PER_STEP = 16 << 10
#: A slope within this many of its own standard errors is noise, so the limit is raised to them.
NOISE_ERRORS = 4.0
#: Number of tensors that a report lists.
MOST_TENSORS = 12
MOST_NAME_CHARACTERS = 120
#: Name of the bin for memory that loading takes beyond any step, and gives back.
LOADING = "loading"
BIN_NOTES = {
    "libraries": "Python, numpy and the engine's library, before the job",
    "tokenizer": "what stays when the rows are tokenised",
    "engine": "sessions, and pages of its library that came with them",
    "weights": "resident pages of mapped weight files",
    "live": "tensors of the program that holds most, and what the engine keeps for them",
    "waiting": "values that wait between segments",
    "slices": "trained values, their change and tangents",
    LOADING: "the tokenizer at work, before the first step",
}


def warm_up(steps: int) -> int:
    """Number of first steps that are left out of step time and leak check."""
    return min(MOST_WARM_UP_STEPS, steps // 5)


def after_warm_up(kept: Sequence[StepMeasure], steps: int) -> tuple[list[tuple[int, StepMeasure]], int]:
    """The steps after the warm-up.

    Args:
        kept: measurements of steps that :class:`edge_runtime.worker.memory_breakdown.MemoryBreakdown` kept: the first
            and every stride-th, where the stride is a power of 2.
        steps: number of all steps.

    Returns:
        The kept steps after the warm-up, each with its number; and the stride.
    """
    stride = 1
    while kept and -(-steps // stride) > len(kept):
        stride *= 2
    numbered = [(index * stride, step) for index, step in enumerate(kept)]
    return [(number, step) for number, step in numbered if number >= warm_up(steps)], stride


def step_seconds(kept: Sequence[StepMeasure], steps: int) -> float | None:
    """Median time of a step after the warm-up; None where fewer than two of them were kept."""
    measured, stride = after_warm_up(kept, steps)
    gaps = [(later.end_s - earlier.end_s) / stride for (_, earlier), (_, later) in pairwise(measured)]
    return max(0.0, median(gaps)) if gaps else None


def growth(kept: Sequence[StepMeasure], steps: int) -> Growth | None:
    """The leak check: least-squares slope of anonymous memory over the steps after the warm-up.

    Pages of files are left out: they come a stretch at a time, whenever a library's code is first used, and cannot grow
    beyond the files.

    Returns:
        The check; None where fewer than ``FEWEST_CHECKED_STEPS`` steps are left.
    """
    measured, _ = after_warm_up(kept, steps)
    checked = steps - warm_up(steps)
    if checked < FEWEST_CHECKED_STEPS:
        return None
    slope, error = _slope(
        [float(number) for number, _ in measured], [float(step.anonymous_bytes) for _, step in measured]
    )
    return Growth(
        steps=checked,
        first_bytes=measured[0][1].anonymous_bytes,
        last_bytes=measured[-1][1].anonymous_bytes,
        per_step_bytes=slope,
        limit_per_step_bytes=max(float(LEAK_BYTES_PER_STEP), NOISE_ERRORS * error),
        warm_up=warm_up(steps),
    )


def _slope(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of ys over xs, and its standard error. It needs three points."""
    count = len(xs)
    mean_x, mean_y = sum(xs) / count, sum(ys) / count
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, float((rest / (count - 2) / spread) ** 0.5)


def bins(peak: PeakPrediction, measured: Sequence[BinMeasure], phases: Mapping[str, int]) -> tuple[Bin, ...]:
    """Each part of the prediction beside what was measured of it.

    The worker splits the peak of the step phase. Where loading took more, the difference is a bin of its own, so that
    the bins add up to the peak of the whole run.

    Args:
        peak: the plan's prediction.
        measured: the worker's measurements; empty if it was killed.
        phases: high-water mark of each phase.
    """
    sizes = {bin_.name: bin_.measured_bytes for bin_ in measured}
    rows = [
        Bin(name, predicted, sizes.get(name), BIN_NOTES.get(name, ""))
        for name, predicted in peak.parts.items()
    ]
    predicted = peak.total_bytes - sum(peak.parts.values())
    passed = max(0, max(phases.values(), default=0) - phases.get("step", 0)) if measured else None
    if predicted or passed:
        rows.append(Bin(LOADING, predicted, passed, BIN_NOTES[LOADING]))
    return tuple(rows)


def phase_peaks(
    peaks: Mapping[str, int], entered_s: Mapping[str, float], end_s: float
) -> tuple[PhasePeak, ...]:
    """Each phase with its high-water mark and the time it took, in order.

    Args:
        peaks: high-water mark of each phase.
        entered_s: start of each phase, in seconds after the worker's start.
        end_s: the worker's end, in seconds after its start.
    """
    names = [name for name in entered_s if name in peaks]
    starts = [entered_s[name] for name in names] + [end_s]
    took = {
        name: max(0.0, later - start) for name, (start, later) in zip(names, pairwise(starts), strict=True)
    }
    return tuple(
        PhasePeak(name, peaks[name], took.get(name, 0.0))
        for name in [*names, *(name for name in peaks if name not in took)]
    )


def tensors(planner: Planner, plan: Plan) -> tuple[LiveTensor, ...]:
    """The largest tensors alive at the peak of the program that holds most; empty if the package does not name them."""
    program, variant = _largest_program(planner, plan)
    found = [
        LiveTensor(
            name=_shown(tensor.name),
            program=_shown(program),
            operator=_shown(tensor.operator),
            shape=_shown(_shape(tensor, plan)),
            bytes=int(_live(replace(variant, live=((tensor.size,),)), plan)),
            what=tensor_words(tensor),
        )
        for tensor in variant.peak_tensors
    ]
    return tuple(sorted(found, key=lambda tensor: -tensor.bytes)[:MOST_TENSORS])


#: What an operator makes, in words; the first match counts.
_MADE = (
    (("Embedding", "Gather"), "embeddings of the tokens"),
    (("LayerNorm", "RMSNorm", "Normalization"), "normalised activations"),
    (("Quantize",), "activations rounded to int8"),
    (("MatMul", "Gemm", "linear"), "a linear layer's output"),
    (("Softmax",), "attention weights"),
    (("Gelu", "Erf", "Relu", "Tanh", "Sigmoid", "Silu", "Swish"), "an activation function's output"),
    (("Transpose", "Reshape", "Expand", "Concat", "Slice", "Squeeze"), "rearranged activations"),
    (("ReduceSum", "ReduceMean", "ReduceMax"), "sums over activations"),
)


def tensor_words(tensor: PeakTensor) -> str:
    """What a tensor is, in words: what its operator makes, or what its sides tell, and whether it is a tangent."""
    sides = {name for side in tensor.shape for name in side.split("*")}
    if not sides & {"batch", "sequence", "draws"}:
        return "a slice's values or a constant"
    if tensor.shape[-2:] == ("sequence", "sequence"):
        made = "attention scores of each token with each other"
    else:
        made = next(
            (
                words
                for operators, words in _MADE
                if any(part.lower() in tensor.operator.lower() for part in operators)
            ),
            "values between two layers",
        )
    return f"tangents of {made}" if "draws" in sides else made


def _largest_program(planner: Planner, plan: Plan) -> tuple[str, Variant]:
    manifest: Manifest = planner.manifest
    names = dict.fromkeys(planner.program_names(plan.work))
    variants = [(name, manifest.programs[name].variants[planner.arithmetic]) for name in names]
    return max(variants, key=lambda item: _live(item[1], plan))


def _live(variant: Variant, plan: Plan) -> float:
    return live_bytes(
        variant, plan.choice.micro_batch, plan.work.sequence, max(1, plan.choice.draws_at_a_time)
    )


def _shape(tensor: PeakTensor, plan: Plan) -> str:
    """The shape with the plan's numbers in place of dynamic sides. An unknown side keeps its name."""
    known = {
        "batch": plan.choice.micro_batch,
        "sequence": plan.work.sequence,
        "draws": max(1, plan.choice.draws_at_a_time),
    }
    return " × ".join(_side(side, known) for side in tensor.shape) or "scalar"


def _side(side: str, known: Mapping[str, int]) -> str:
    product = 1
    for factor in side.split("*"):
        if not factor.isdecimal() and factor not in known:
            return side
        product *= known[factor] if factor in known else int(factor)
    return str(product)


def _shown(text: str) -> str:
    """A package's text in the form in which a report may print it."""
    return "".join(c for c in text if c.isprintable())[:MOST_NAME_CHARACTERS] or "–"
