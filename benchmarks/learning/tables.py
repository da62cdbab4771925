"""What the learning bench's records show: where every arm ended, and each claim with its true value."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec

from benchmarks.harness.result_file import RESULTS, Figure, write_result
from benchmarks.learning.arms import ARMS, DECODER, DECODER_ARMS, RATES, REPORTS, arms_of
from benchmarks.learning.device_cost import at_equal_memory, peaks, with_ample_memory
from coordinator.simulation.record import Point, Record

#: Our arms, with their number of draws in words.
OURS = {"ours": "8 draws", "ours16": "16 draws"}
#: Spry's arms, the one with the most passes first.
SPRY = ("spry8", "spry")
ZERO_ORDER = ("mezo", "baffle", "fwdllm")
#: Arms whose memory is measured. On a device, each of the others does the same as one of these.
MEASURED = ("head", "backprop", "ours", "ours16", "lora8", "spry", "mezo", "baffle", "fwdllm")
#: The task whose workers are measured. Bytes and times depend on shapes, which are the same for all tasks except the
#: head's.
COSTS_TASK = "trec"
TITLES = {
    "trec": "TREC",
    "trec_fine": "TREC, fine types",
    "sst2": "SST-2",
    "ag_news": "AG News",
    "banking77": "banking77",
}
SPEAKERS = "Shakespeare by speaker"
#: Least share to reach, in percent, of backpropagation's gain on the same slices, by the Dirichlet alpha.
KEPT = {"1.0": 90.0, "0.1": 80.0}
#: Least share to reach, in percent, of the gain with LoRA r=8.
KEPT_OF_LORA = 75.0
#: Least gain, in points, of which a share is worth telling.
DENOMINATOR = 5.0
#: Shares of a decoder: forward mode's arm, backpropagation's arm, and the least share to reach, in percent.
DECODER_SHARES = (
    ("ours", "backprop", KEPT["1.0"]),
    ("ours16", "backprop", KEPT["1.0"]),
    ("ours-lora1", "backprop-lora1", KEPT["1.0"]),
    ("ours", "lora8", KEPT_OF_LORA),
    ("ours-lora1", "lora8", KEPT_OF_LORA),
)
#: Least ratio of our gain to Spry's at equal passes.
TWICE = 2.0
#: Largest ratio of our passes to those that Spry, or the best of zero order, took to its best.
FIFTH, TENTH = 0.2, 0.1
#: Largest uplink, in percent of that of LoRA r=8.
UPLINK = 1.0


@dataclass(frozen=True)
class ArmCurve:
    """How an arm learnt: its records, one for each seed."""

    records: tuple[Record, ...]

    def finals(self) -> dict[int, float]:
        """Accuracy after the last round by seed, in percent; if the arm diverged, after the last round it played."""
        return {record.seed: 100 * float(record.points[-1].accuracy or 0) for record in self.records}

    def perplexities(self) -> dict[int, float]:
        """A decoder's perplexity after the last round, by seed."""
        return {record.seed: round(float(record.points[-1].perplexity or 0), 2) for record in self.records}

    def mean(self, seeds: Sequence[int]) -> float:
        """The mean of the final accuracies over some seeds, in percent."""
        finals = self.finals()
        return fmean(finals[seed] for seed in seeds)

    def mean_curve(self, seeds: Sequence[int]) -> list[tuple[float, float]]:
        """Means over seeds of (passes, accuracy in percent) after each evaluated round."""
        return self._means(seeds, lambda _, point: 100 * float(point.accuracy or 0))

    def losses_off(self, seeds: Sequence[int]) -> list[tuple[float, float]]:
        """Means over seeds of (passes, loss at the start minus loss now) after each evaluated round."""
        return self._means(seeds, lambda start, point: float(start.loss or 0) - float(point.loss or 0))

    def _means(
        self, seeds: Sequence[int], value: Callable[[Point, Point], float]
    ) -> list[tuple[float, float]]:
        """Means of (passes, value) at each point that all of the seeds have.

        Args:
            seeds: seeds to take the mean over.
            value: function of the first point of a record and of the point at hand.
        """
        chosen = [record.points for record in self.records if record.seed in seeds]
        starts = [points[0] for points in chosen]
        return [
            (fmean(point.forward_passes for point in points), fmean(map(value, starts, points)))
            for points in zip(*chosen, strict=False)
        ]


def read_curves(folder: Path) -> dict[str, ArmCurve]:
    """Curves of a sweep's arms, by name."""
    found: dict[str, list[Record]] = {}
    for path in sorted((folder / "arms").glob("*-seed*.json")):
        record = msgspec.json.decode(path.read_bytes(), type=Record)
        if record.points:
            found.setdefault(record.arm, []).append(record)
    return {name: ArmCurve(tuple(records)) for name, records in found.items()}


def ends(title: str, curves: dict[str, ArmCurve]) -> list[Figure]:
    """Accuracy of each arm after its last round."""
    rows = []
    for name in ARMS:
        if name in curves:
            finals = list(curves[name].finals().values())
            label = f"{title}: {ARMS[name].kind} ({_seeds(len(finals))})"
            rows.append(_row(label, fmean(finals), "%", low=min(finals), high=max(finals)))
    return rows


def claims(title: str, alpha: str, curves: dict[str, ArmCurve]) -> list[Figure]:
    """The claims about one task and partition; arms are compared over the seeds that both have."""
    if not {"head", "backprop", "ours"} <= curves.keys():
        return []
    rows = _kept(title, "backprop", "", KEPT[alpha], curves)
    if "lora8" in curves:
        rows += _kept(title, "lora8", " with LoRA r=8", KEPT_OF_LORA, curves)
    longest = next((name for name in SPRY if name in curves), None)
    if longest is not None:
        rows += _against_spry(title, longest, curves)
    if any(name in curves for name in ZERO_ORDER):
        rows += _against_zero_order(title, curves)
    return rows


def decoder_ends(curves: dict[str, ArmCurve]) -> list[Figure]:
    """Perplexity on held-out speeches: where all arms begin, and where each ends."""
    rows = []
    for name, arm in arms_of(DECODER).items():
        if name not in curves:
            continue
        records = curves[name].records
        first = [float(record.points[0].perplexity or 0) for record in records]
        last = list(curves[name].perplexities().values())
        if not rows:
            rows.append(_row(f"{SPEAKERS}: perplexity before", fmean(first), ""))
        words = f"{SPEAKERS}: perplexity, {arm.kind} ({_seeds(len(last))})"
        rows.append(_row(words, fmean(last), "", low=min(last), high=max(last)))
    return rows


def decoder_claims(curves: dict[str, ArmCurve]) -> list[Figure]:
    """How much of backpropagation's drop in loss forward mode reaches, counted from the untrained model.

    A decoder has no head to train alone, so the untrained model takes the place that head only has elsewhere.
    """
    rows = []
    for ours, full, reach in DECODER_SHARES:
        if {full, ours} <= curves.keys():
            label = f"{SPEAKERS}: loss off by {_kind(ours)}, over {_kind(full)}"
            rows.append(loss_share(label, curves[ours], curves[full], reach))
    for ours in ("ours", "ours-lora1", "ours-lora1-1"):
        if {ours, "spry"} <= curves.keys():
            seeds = _common(curves, (ours, "spry"))
            our_off, spry_off = curves[ours].losses_off(seeds), curves["spry"].losses_off(seeds)
            _, our_best, spry_best = _at_equal_passes(our_off, spry_off)
            times = our_best / spry_best
            label = f"{SPEAKERS}: loss off by {_kind(ours)}, over Spry's, at equal passes"
            rows.append(_row(label, times, "times", TWICE, times >= TWICE))
            rows += _passes_to(f"{SPEAKERS}: passes to Spry's best, {_kind(ours)}", our_off, spry_off, FIFTH)
    return rows


def loss_share(label: str, part: ArmCurve, whole: ArmCurve, reach: float) -> Figure:
    """The loss that one arm takes off over that of another, in percent, over the seeds that both have."""
    seeds = _common({"part": part, "whole": whole}, ("part", "whole"))
    off, full = ([curve.losses_off([seed])[-1][1] for seed in seeds] for curve in (part, whole))
    return _share(label, off, full, reach)


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


def _kind(name: str) -> str:
    return arms_of(DECODER)[name].kind


def _at_equal_passes(
    ours: list[tuple[float, float]], theirs: list[tuple[float, float]]
) -> tuple[float, float, float]:
    """The largest number of passes that both took, and the best value that each had within it."""
    passes = min(ours[-1][0], theirs[-1][0])
    our_best, their_best = (
        max(value for taken, value in curve if taken <= passes) for curve in (ours, theirs)
    )
    return passes, our_best, their_best


def write_tables(output: Path, command: str) -> None:
    """Write the result files from all sweeps in ``output``.

    ``learning.json`` has the claims; ``learning-arms.json`` has where every arm ended, with its grid and curve; and
    ``learning-costs.json`` has bytes, memory and time.
    """
    claimed: list[Figure] = []
    ended: list[Figure] = []
    sweeps: dict[str, Any] = {}
    for task, title in TITLES.items():
        for alpha in KEPT:
            curves = read_curves(output / f"arms-{task}-{alpha}")
            if curves:
                ended += ends(f"{title}, Dirichlet {alpha}", curves)
                claimed += claims(f"{title}, Dirichlet {alpha}", alpha, curves)
                sweeps[f"{task}-{alpha}"] = {name: _summary(curve) for name, curve in curves.items()}
    decoder = read_curves(output / f"arms-{DECODER}-natural")
    ended += decoder_ends(decoder)
    claimed += decoder_claims(decoder)
    costs = [*_uplink(TITLES[COSTS_TASK], output, COSTS_TASK), *_costs(output, COSTS_TASK)]
    claimed += [row for row in costs if row.reach is not None]
    conditions = {
        "rates, by task": RATES,
        "grids": {name: arm.grid for name, arm in {**ARMS, **DECODER_ARMS}.items()},
        "accuracy of each rate in percent, by seed of the grid": _grids(output, ArmCurve.finals, *TITLES),
        "perplexity of each rate, by seed of the grid": _grids(output, ArmCurve.perplexities, DECODER),
        "sweeps": sweeps,
    }
    write_result(RESULTS / "learning.json", command, 1, claimed, {})
    write_result(RESULTS / "learning-arms.json", command, 1, ended, json.loads(json.dumps(conditions)))
    write_result(RESULTS / "learning-costs.json", command, 1, costs, {})


def _grids(output: Path, end: Callable[[ArmCurve], dict[int, float]], *tasks: str) -> dict[str, Any]:
    """Where every arm of a grid ended, by task, by arm with rate, and by seed; tasks without a grid are left out."""
    found = {
        task: {name: end(curve) for name, curve in read_curves(output / f"rates-{task}").items()}
        for task in tasks
    }
    return {task: ended for task, ended in found.items() if ended}


def _kept(title: str, name: str, words: str, reach: float, curves: dict[str, ArmCurve]) -> list[Figure]:
    """Backpropagation's gain, and the share of it that forward mode keeps: a ratio of means, with its range over seeds.

    A share of less than ``DENOMINATOR`` points would be chance, so it is left out.

    Args:
        title: task and partition in words.
        name: name of backpropagation's arm.
        words: addition to the row's name that says which arm that is.
        reach: least share to reach, in percent.
        curves: all arms by name.
    """
    seeds = _common(curves, ("head", name))
    if not seeds:
        return []
    gains = [_gain(curves, name, [seed]) for seed in seeds]
    gain = _gain(curves, name, seeds)
    rows = [
        _row(
            f"{title}: backpropagation's gain{words}",
            gain,
            "points",
            DENOMINATOR,
            gain >= DENOMINATOR,
            low=min(gains),
            high=max(gains),
        )
    ]
    for ours, draws in OURS.items():
        seeds = _common(curves, ("head", name, ours)) if ours in curves else []
        if seeds and gain >= DENOMINATOR:
            kept, whole = ([_gain(curves, arm, [seed]) for seed in seeds] for arm in (ours, name))
            rows.append(_share(f"{title}: of the gain{words}, kept by {draws}", kept, whole, reach))
    return rows


def _share(name: str, parts: Sequence[float], wholes: Sequence[float], reach: float) -> Figure:
    """The sum of the parts over that of the wholes, in percent; its range is over the seeds whose whole is a gain."""
    share = 100 * sum(parts) / sum(wholes)
    shares = [100 * part / whole for part, whole in zip(parts, wholes, strict=True) if whole > 0]
    return _row(name, share, "%", reach, share >= reach, low=min(shares), high=max(shares))


def _gain(curves: dict[str, ArmCurve], name: str, seeds: Sequence[int]) -> float:
    """An arm's mean accuracy minus that of head only, in points."""
    return curves[name].mean(seeds) - curves["head"].mean(seeds)


def _against_spry(title: str, name: str, curves: dict[str, ArmCurve]) -> list[Figure]:
    """Ours and Spry at the largest number of passes that both took; gains are compared only if Spry has one."""
    seeds = _common(curves, ("head", "ours", name))
    if not seeds:
        return []
    head = curves["head"].mean(seeds)
    ours, spry = curves["ours"].mean_curve(seeds), curves[name].mean_curve(seeds)
    passes, ours_best, spry_best = _at_equal_passes(ours, spry)
    rows = [
        _row(f"{title}: ours, best within {passes:,.0f} passes", ours_best, "%"),
        _row(
            f"{title}: Spry, best within {passes:,.0f} passes (head only ends at {head:.1f} %)",
            spry_best,
            "%",
        ),
    ]
    if spry_best > head:
        times = (ours_best - head) / (spry_best - head)
        rows.append(
            _row(f"{title}: ours over Spry's gain, at equal passes", times, "times", TWICE, times >= TWICE)
        )
    return [*rows, *_passes_to(f"{title}: passes to Spry's best, over its own", ours, spry, FIFTH)]


def _against_zero_order(title: str, curves: dict[str, ArmCurve]) -> list[Figure]:
    best = max((name for name in ZERO_ORDER if name in curves), key=lambda name: _best(curves, name))
    seeds = _common(curves, ("ours", best))
    if not seeds:
        return []
    words = f"{title}: passes to the best of zero order ({best}), over its own"
    return _passes_to(words, curves["ours"].mean_curve(seeds), curves[best].mean_curve(seeds), TENTH)


def _uplink(title: str, output: Path, task: str) -> list[Figure]:
    """Bytes of one result for each of our ways to report, beside those of LoRA r=8 that reports weights."""
    reports = read_curves(output / f"reports-{task}")
    lora = read_curves(output / f"arms-{task}-1.0").get("lora8")
    sizes = {name: _bytes_up(curve) for name, curve in reports.items()}
    rows = [
        _row(f"{title}: bytes up a task, {REPORTS[name].kind}", size, "B") for name, size in sizes.items()
    ]
    if lora is None:
        return rows
    whole = _bytes_up(lora)
    rows.append(_row(f"{title}: bytes up a task, LoRA r=8, weights", whole, "B"))
    for name in ("scalars", "weights-frozen-head", "scalars-frozen-head"):
        if name in sizes:
            share = 100 * sizes[name] / whole
            words = f"{title}: {REPORTS[name].kind}, over LoRA r=8 in weights"
            rows.append(_row(words, share, "%", UPLINK, share <= UPLINK))
    return rows


def _costs(output: Path, task: str) -> list[Figure]:
    """Memory of each arm's worker, and seconds a step of forward mode over backpropagation's under the same cap."""
    title = TITLES[task]
    measured = peaks(output, task, MEASURED)
    rows = [
        _row(f"{title}: worker's peak, {ARMS[name].kind}", peak, "bytes") for name, peak in measured.items()
    ]
    for name, draws in OURS.items():
        for words, cap in (
            ("", at_equal_memory(output, task, name, measured["backprop"])),
            (" (ample)", with_ample_memory(output, task, name)),
        ):
            capped = f"both capped at {cap.cap_bytes / 1e6:.0f} MB{words}"
            label = f"{title}: {draws} over backpropagation, time a step, {capped}"
            rows.append(_row(label, median(cap.times), "times", low=min(cap.times), high=max(cap.times)))
    return rows


def _bytes_up(curve: ArmCurve) -> int:
    return round(fmean(record.points[-1].bytes_up / record.results for record in curve.records))


def _passes_to(
    name: str, ours: list[tuple[float, float]], theirs: list[tuple[float, float]], reach: float
) -> list[Figure]:
    """Passes that our arm took to the other arm's best value, over the passes that arm took itself.

    Args:
        name: name of the row.
        ours: (passes, value) of our arm.
        theirs: (passes, value) of the other arm.
        reach: largest ratio to reach. If our arm never has that value, the ratio is infinite.
    """
    best = max(accuracy for _, accuracy in theirs)
    own = next(passes for passes, accuracy in theirs if accuracy == best)
    taken = next((passes for passes, accuracy in ours if accuracy >= best), None)
    if taken is None or own == 0:
        return [
            _row(
                f"{name} (never reached)",
                float("inf") if taken is None else 0.0,
                "times",
                reach,
                taken is not None,
            )
        ]
    return [_row(name, taken / own, "times", reach, taken / own <= reach)]


def _best(curves: dict[str, ArmCurve], name: str) -> float:
    curve = curves[name]
    return max(accuracy for _, accuracy in curve.mean_curve(list(curve.finals())))


def _common(curves: dict[str, ArmCurve], names: Sequence[str]) -> list[int]:
    return sorted(set.intersection(*(set(curves[name].finals()) for name in names)))


def _summary(curve: ArmCurve) -> dict[str, Any]:
    seeds = sorted(curve.finals())
    last = [record.points[-1] for record in curve.records]
    return {
        "seeds": seeds,
        "status": [record.status for record in curve.records],
        "accuracy": [round(curve.finals()[seed], 2) for seed in seeds],
        "forward_passes": [point.forward_passes for point in last],
        "bytes_up_a_task": _bytes_up(curve),
        "curve": [[round(passes), round(accuracy, 2)] for passes, accuracy in curve.mean_curve(seeds)],
    }


def _row(
    name: str,
    value: float,
    unit: str,
    reach: float | None = None,
    met: bool | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    shown = [
        round(each, 2) for each in (value, value if low is None else low, value if high is None else high)
    ]
    return Figure(name, shown[0], unit, reach, met, shown[1], shown[2])
