"""What the learning bench's records say: where every arm ended, and the claims, each with its true value."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec

from benchmarks.learning_arms import ARMS, DECODER, RATES, REPORTS, arms_of
from benchmarks.learning_memory import at_equal_memory, peaks, with_ample_memory
from benchmarks.result_file import RESULTS, Figure, write_result
from coordinator.simulation.record import Record

OURS = ("ours", "ours16")
DRAWS = {"ours": "8 draws", "ours16": "16 draws"}
#: Spry's arms, the one with most passes first.
SPRY = ("spry8", "spry")
ZERO_ORDER = ("mezo", "baffle", "fwdllm")
#: Arms whose memory is measured; the others do on a device what one of these does.
MEASURED = ("head", "backprop", "ours", "ours16", "lora8", "spry", "mezo", "baffle", "fwdllm")
#: The task whose workers are measured: bytes and times follow the shapes, which all share but for the head.
COSTS_TASK = "trec"
TITLES = {
    "trec": "TREC",
    "trec_fine": "TREC, fine types",
    "sst2": "SST-2",
    "ag_news": "AG News",
    "banking77": "banking77",
}
SPEAKERS = "Shakespeare by speaker"
#: Wanted of gain kept by Dirichlet alpha; against LoRA r=8; points a denominator must have.
KEPT = {"1.0": 90.0, "0.1": 80.0}
KEPT_OF_LORA, DENOMINATOR = 75.0, 5.0
#: The same of a decoder: an arm, backpropagation, what is wanted.
DECODER_SHARES = (
    ("ours", "backprop", KEPT["1.0"]),
    ("ours16", "backprop", KEPT["1.0"]),
    ("ours-lora1", "backprop-lora1", KEPT["1.0"]),
    ("ours", "lora8", KEPT_OF_LORA),
    ("ours-lora1", "lora8", KEPT_OF_LORA),
)
#: Wanted of gains over Spry's at equal passes, of passes to its best, and to the best of zero order.
TWICE, FIFTH, TENTH = 2.0, 0.2, 0.1
#: Percent of LoRA r=8's uplink.
UPLINK = 1.0


@dataclass(frozen=True)
class Curve:
    """An arm's records, one a seed."""

    records: tuple[Record, ...]

    def finals(self) -> dict[int, float]:
        """Seed to accuracy after the last round, in percent; a diverged arm counts as it last was."""
        return {record.seed: 100 * float(record.points[-1].accuracy or 0) for record in self.records}

    def perplexities(self) -> dict[int, float]:
        """Seed to perplexity after the last round, of a decoder."""
        return {record.seed: round(float(record.points[-1].perplexity or 0), 2) for record in self.records}

    def mean(self, seeds: Sequence[int]) -> float:
        """Of the finals over some seeds."""
        finals = self.finals()
        return fmean(finals[seed] for seed in seeds)

    def mean_curve(self, seeds: Sequence[int]) -> list[tuple[float, float]]:
        """(passes, accuracy in percent) after each evaluated round, means over seeds."""
        chosen = [record.points for record in self.records if record.seed in seeds]
        return [
            (
                fmean(point.forward_passes for point in points),
                fmean(100 * float(p.accuracy or 0) for p in points),
            )
            for points in zip(*chosen, strict=False)
        ]


def read_curves(folder: Path) -> dict[str, Curve]:
    """The arms of a sweep by name."""
    found: dict[str, list[Record]] = {}
    for path in sorted((folder / "arms").glob("*-seed*.json")):
        record = msgspec.json.decode(path.read_bytes(), type=Record)
        if record.points:
            found.setdefault(record.arm, []).append(record)
    return {name: Curve(tuple(records)) for name, records in found.items()}


def ends(title: str, curves: dict[str, Curve]) -> list[Figure]:
    """Accuracy of each arm after its last round."""
    rows = []
    for name in ARMS:
        if name in curves:
            finals = list(curves[name].finals().values())
            label = f"{title}: {ARMS[name].kind} ({len(finals)} seed{'s' * (len(finals) > 1)})"
            rows.append(_row(label, fmean(finals), "%", low=min(finals), high=max(finals)))
    return rows


def claims(title: str, alpha: str, curves: dict[str, Curve]) -> list[Figure]:
    """What the ends come to; comparisons are over seeds that both arms have."""
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


def decoder_ends(curves: dict[str, Curve]) -> list[Figure]:
    """Perplexity on speeches kept back: where all arms begin, and where each ends."""
    rows = []
    for name, arm in arms_of(DECODER).items():
        if name not in curves:
            continue
        records = curves[name].records
        first = [float(record.points[0].perplexity or 0) for record in records]
        last = list(curves[name].perplexities().values())
        if not rows:
            rows.append(_row(f"{SPEAKERS}: perplexity before", fmean(first), ""))
        words = f"{SPEAKERS}: perplexity, {arm.kind} ({len(last)} seeds)"
        rows.append(_row(words, fmean(last), "", low=min(last), high=max(last)))
    return rows


def decoder_claims(curves: dict[str, Curve]) -> list[Figure]:
    """Of the loss that backpropagation takes off the model as it came, what forward mode takes off.

    There is no head to train alone, so the model as it came stands where head only stands elsewhere.
    """
    rows = []
    for ours, full, reach in DECODER_SHARES:
        if {full, ours} <= curves.keys():
            seeds = _common(curves, (full, ours))
            off, whole = (_losses_off(curves[name], seeds) for name in (ours, full))
            shares = [100 * part / all_of_it for part, all_of_it in zip(off, whole, strict=True)]
            kept = 100 * sum(off) / sum(whole)
            label = f"{SPEAKERS}: loss off by {_kind(ours)}, over {_kind(full)}"
            rows.append(_row(label, kept, "%", reach, kept >= reach, min(shares), max(shares)))
    for ours in ("ours", "ours-lora1", "ours-lora1-1"):
        if {ours, "spry"} <= curves.keys():
            our_off, spry_off = _loss_off(curves[ours]), _loss_off(curves["spry"])
            passes = min(our_off[-1][0], spry_off[-1][0])
            times = _best_within(our_off, passes) / _best_within(spry_off, passes)
            label = f"{SPEAKERS}: loss off by {_kind(ours)}, over Spry's, at equal passes"
            rows.append(_row(label, times, "times", TWICE, times >= TWICE))
            rows += _passes_to(f"{SPEAKERS}: passes to Spry's best, {_kind(ours)}", our_off, spry_off, FIFTH)
    return rows


def _kind(name: str) -> str:
    return arms_of(DECODER)[name].kind


def _losses_off(curve: Curve, seeds: Sequence[int]) -> list[float]:
    """Start to end, by seed."""
    ends = {record.seed: (record.points[0].loss, record.points[-1].loss) for record in curve.records}
    return [float(first or 0) - float(last or 0) for first, last in (ends[seed] for seed in seeds)]


def _loss_off(curve: Curve) -> list[tuple[float, float]]:
    """(passes, loss taken off since the start) after each evaluated round, means over seeds."""
    started = fmean(float(record.points[0].loss or 0) for record in curve.records)
    return [
        (fmean(p.forward_passes for p in points), started - fmean(float(p.loss or 0) for p in points))
        for points in zip(*(record.points for record in curve.records), strict=False)
    ]


def _best_within(curve: list[tuple[float, float]], passes: float) -> float:
    return max(value for taken, value in curve if taken <= passes)


def write_tables(output: Path, command: str) -> None:
    """Results from all sweeps in ``output``.

    ``learning.json`` has the claims, ``learning-arms.json`` where every arm ended, with its grid and curve, and
    ``learning-costs.json`` bytes, memory and time.
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
        "grids": {name: arm.grid for name, arm in ARMS.items()},
        "accuracy of each rate in percent, by seed of the grid": _grids(output, Curve.finals, *TITLES),
        "perplexity of each rate, by seed of the grid": _grids(output, Curve.perplexities, DECODER),
        "sweeps": sweeps,
    }
    write_result(RESULTS / "learning.json", command, 1, claimed, {})
    write_result(RESULTS / "learning-arms.json", command, 1, ended, json.loads(json.dumps(conditions)))
    write_result(RESULTS / "learning-costs.json", command, 1, costs, {})


def _grids(output: Path, end: Callable[[Curve], dict[int, float]], *tasks: str) -> dict[str, Any]:
    """Task to arm and rate to where it ended, by seed; tasks without a grid are left out."""
    found = {
        task: {name: end(curve) for name, curve in read_curves(output / f"rates-{task}").items()}
        for task in tasks
    }
    return {task: ended for task, ended in found.items() if ended}


def _kept(title: str, name: str, words: str, reach: float, curves: dict[str, Curve]) -> list[Figure]:
    """The denominator, and the share of it that forward mode keeps: ratio of means, range over seeds.

    A share of less than ``DENOMINATOR`` points is chance, and is not told.
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
            min(gains),
            max(gains),
        )
    ]
    for ours in OURS:
        if ours in curves and gain >= DENOMINATOR:
            rows += _share(f"{title}: of the gain{words}, kept by {DRAWS[ours]}", ours, name, reach, curves)
    return rows


def _share(name: str, ours: str, full: str, reach: float, curves: dict[str, Curve]) -> list[Figure]:
    seeds = _common(curves, ("head", full, ours))
    if not seeds:
        return []
    kept = 100 * _gain(curves, ours, seeds) / _gain(curves, full, seeds)
    shares = [
        100 * _gain(curves, ours, [seed]) / _gain(curves, full, [seed])
        for seed in seeds
        if _gain(curves, full, [seed]) > 0
    ]
    return [_row(name, kept, "%", reach, kept >= reach, min(shares), max(shares))]


def _gain(curves: dict[str, Curve], name: str, seeds: Sequence[int]) -> float:
    """An arm's mean accuracy over head only's, in points."""
    return curves[name].mean(seeds) - curves["head"].mean(seeds)


def _against_spry(title: str, name: str, curves: dict[str, Curve]) -> list[Figure]:
    """Both at the most passes that both took; a gain of Spry's is compared only where it has one."""
    seeds = _common(curves, ("head", "ours", name))
    if not seeds:
        return []
    head = curves["head"].mean(seeds)
    ours, spry = curves["ours"].mean_curve(seeds), curves[name].mean_curve(seeds)
    passes = min(ours[-1][0], spry[-1][0])
    ours_best, spry_best = _best_within(ours, passes), _best_within(spry, passes)
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


def _against_zero_order(title: str, curves: dict[str, Curve]) -> list[Figure]:
    best = max((name for name in ZERO_ORDER if name in curves), key=lambda name: _best(curves, name))
    seeds = _common(curves, ("ours", best))
    if not seeds:
        return []
    words = f"{title}: passes to the best of zero order ({best}), over its own"
    return _passes_to(words, curves["ours"].mean_curve(seeds), curves[best].mean_curve(seeds), TENTH)


def _uplink(title: str, output: Path, task: str) -> list[Figure]:
    """Bytes of a result, as ours reports it, beside LoRA r=8 in weights."""
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
    """Memory of each arm's worker, and forward mode's time beside backpropagation's under the same cap."""
    title = TITLES[task]
    measured = peaks(output, task, MEASURED)
    rows = [
        _row(f"{title}: worker's peak, {ARMS[name].kind}", peak, "bytes") for name, peak in measured.items()
    ]
    for name in OURS:
        for words, cap in (
            ("", at_equal_memory(output, task, name, measured["backprop"])),
            (" (ample)", with_ample_memory(output, task, name)),
        ):
            capped = f"both capped at {cap.cap_bytes / 1e6:.0f} MB{words}"
            label = f"{title}: {DRAWS[name]} over backpropagation, time a step, {capped}"
            rows.append(_row(label, median(cap.times), "times", low=min(cap.times), high=max(cap.times)))
    return rows


def _bytes_up(curve: Curve) -> int:
    return round(fmean(record.points[-1].bytes_up / record.results for record in curve.records))


def _passes_to(
    name: str, ours: list[tuple[float, float]], theirs: list[tuple[float, float]], reach: float
) -> list[Figure]:
    """How many passes we took to be as good as they ever were, over theirs; no row if we never were."""
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


def _best(curves: dict[str, Curve], name: str) -> float:
    curve = curves[name]
    return max(accuracy for _, accuracy in curve.mean_curve(list(curve.finals())))


def _common(curves: dict[str, Curve], names: Sequence[str]) -> list[int]:
    return sorted(set.intersection(*(set(curves[name].finals()) for name in names)))


def _summary(curve: Curve) -> dict[str, Any]:
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
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    shown = [
        round(each, 2) for each in (value, value if low is None else low, value if high is None else high)
    ]
    return Figure(name, shown[0], unit, reach, met, shown[1], shown[2])
