"""`make bench-one-visit`: what one visit to each device reaches without a gradient, and what slices add on top.

    python -m benchmarks.learning.one_visit --tasks trec,trec_fine --seeds 0,1,2

A ridge classifier over several blocks, solved from one pass of each device, stands beside exact gradients on LoRA
r = 8 over 20 rounds of 10 devices, and beside the head alone over the last block. On top of it, slices of the last two
blocks are trained under a head over the same blocks, and the head is solved again in a visit at the end. Devices, rows,
seeds and rounds are those of ``benchmarks.learning.run``; work that was stopped goes on, and in the result file rows of
other tasks and partitions stay.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.harness.minilm import packaged_model
from benchmarks.harness.result_file import EARLIER, RESULTS, Figure, earlier_rows, write_result
from benchmarks.learning.arms import ADAM, ARMS, PACKAGES, SLICES_RATE, BenchArm, rate_of
from benchmarks.learning.datasets import TASKS, prepare
from benchmarks.learning.run import ROUNDS, ArmSweep, export_package, fill
from benchmarks.learning.tables import ArmCurve, read_curves

RESULT, LEARNING = "one-visit.json", "learning-arms.json"
DEVICES_PER_ROUND = 10
BY_SEED = "accuracy by arm and seed, in percent"
TITLES = {
    "trec": "TREC",
    "trec_fine": "TREC, fine types",
    "banking77": "banking77",
    "sst2": "SST-2",
    "clinc150": "CLINC150",
    "newsgroups": "20 Newsgroups",
    "injongo": "Injongo",
    "sib200": "SIB-200",
    "ag_news": "AG News",
}
VISIT = {"head": "closed_form", "slices": "none", "rounds": 0, "sums_dtype": "float16"}
#: The head's rate where it learns over seven blocks, between the rounds of slices.
WIDE_HEAD = {"name": "adam", "rate": 0.005, "tau": 1e-3}
ON_TOP = {"head": "closed_form", "visit": "last", "sums_dtype": "float16"}


def _on_top(kind: str, **changes: object) -> BenchArm:
    run = {**ON_TOP, **changes, "server_optimizer": {"slices": ADAM, "head": WIDE_HEAD}}
    return BenchArm(kind, "xs", run, SLICES_RATE, ())


ARMS_HERE: dict[str, BenchArm] = {
    "visit": BenchArm("one visit, all blocks", "xs", VISIT, (), ()),
    "visit-last": BenchArm("one visit, the last block alone", "xs", {**VISIT, "features": [6]}, (), ()),
    "head": ARMS["head"],
    "lora8": ARMS["lora8"],
    "exact-top": _on_top("slices by exact gradients, then a visit", update="backprop"),
    "ours8-top": _on_top("slices by 8 draws, then a visit", draws=8),
    "ours16-top": _on_top("slices by 16 draws, then a visit", draws=16),
}
#: Arms whose rate was chosen under another arm's name.
RATED_AS = {"exact-top": "backprop", "ours8-top": "ours", "ours16-top": "ours16"}
#: Least share of what exact gradients add over the visit that 8 draws are to keep, in percent, and the least gain, in
#: points, of which a share is worth telling.
KEPT, DENOMINATOR = 85.0, 4.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and write the result file; returns a process exit code."""
    arguments = _arguments(argv)
    names = arguments.arms.split(",")
    for task in arguments.tasks.split(","):
        # 1. Rows and packages, made once.
        files = prepare(task, arguments.data, arguments.output / "data" / task)
        for package in sorted({ARMS_HERE[name].package for name in names}):
            options = ["--labels", str(files.labels), *PACKAGES[package]]
            export_package(arguments.output, task, package, packaged_model(), files.dev, options)
        # 2. One sweep for each partition.
        for alpha in arguments.alphas.split(","):
            arms = {
                name: (ARMS_HERE[name], rate_of(task, RATED_AS.get(name, name)))
                for name in names
                if name in RATED
            }
            arms |= {name: (ARMS_HERE[name], 0.0) for name in names if name not in RATED}
            sweep = ArmSweep(
                arguments.output / f"visit-{task}-{alpha}",
                task,
                float(alpha),
                tuple(int(seed) for seed in arguments.seeds.split(",")),
                ROUNDS,
                arms,
            )
            path = arguments.output / f"{sweep.folder.name}.toml"
            path.write_text(sweep.config())
            fill(path, sweep, arguments.processes)
    # 3. The table of what is there.
    figures: list[Figure] = []
    curves: dict[str, object] = {}
    titles = []
    for folder in sorted(arguments.output.glob("visit-*-*")):
        if folder.is_dir() and (found := read_curves(folder)):
            task, alpha = folder.name.removeprefix("visit-").rsplit("-", 1)
            title = f"{TITLES[task]}, Dirichlet {alpha}"
            titles.append(title)
            figures += rows(title, found)
            if "visit" in found and "lora8" not in found:
                figures += against_stored(title, found["visit"], f"{task}-{alpha}")
            curves[folder.name] = {name: curve.finals() for name, curve in found.items()}
    command = "python -m benchmarks.learning.one_visit " + " ".join(argv or sys.argv[1:])
    others, commits = earlier_rows(RESULTS / RESULT, titles)
    before = json.loads((RESULTS / RESULT).read_text())["conditions"][BY_SEED] if others else {}
    conditions = {BY_SEED: {**before, **curves}, EARLIER: commits}
    write_result(RESULTS / RESULT, command, 1, [*others, *figures], conditions)
    return 0


RATED = frozenset({"head", "lora8", *RATED_AS})


def rows(title: str, curves: dict[str, ArmCurve]) -> list[Figure]:
    """Where each arm ended, and the claims about them, over the seeds that both sides have."""
    table = [_end(f"{title}: {ARMS_HERE[name].kind}", curves[name]) for name in ARMS_HERE if name in curves]
    if {"visit", "lora8"} <= curves.keys():
        ahead = _differences(curves["visit"], curves["lora8"])
        table.append(
            _figure(f"{title}: one visit over LoRA r=8 after 20 rounds", ahead, "points", 0.0, min(ahead) > 0)
        )
        up = _bytes_up(curves["visit"]) / _bytes_up(curves["lora8"])
        table.append(
            _figure(f"{title}: bytes up of one visit, over those of LoRA r=8", [up], "times", 1.0, up <= 1)
        )
    if {"visit", "exact-top"} <= curves.keys():
        exact = _differences(curves["exact-top"], curves["visit"])
        table.append(_figure(f"{title}: added over one visit by exact gradients", exact, "points"))
        for name in ("ours8-top", "ours16-top"):
            if name in curves:
                table += _kept(title, name, curves, fmean(exact))
    return table


def against_stored(title: str, visit: ArmCurve, sweep: str) -> list[Figure]:
    """One visit beside LoRA r=8 as ``make bench-learning`` left it, on the same devices, rows and seeds."""
    stored = json.loads((RESULTS / LEARNING).read_text("utf-8"))["conditions"]["sweeps"]
    lora8 = stored.get(sweep, {}).get("lora8")
    if lora8 is None:
        return []
    ends, finals = dict(zip(lora8["seeds"], lora8["accuracy"], strict=True)), visit.finals()
    ahead = [finals[seed] - ends[seed] for seed in sorted(finals.keys() & ends.keys())]
    up = _bytes_up(visit) / (lora8["bytes_up_a_task"] * ROUNDS * DEVICES_PER_ROUND)
    label = f"{title}: one visit over exact gradients on LoRA r=8, 20 rounds, of learning.md"
    return [
        _figure(label, ahead, "points", 0.0, min(ahead) > 0),
        _figure(f"{title}: bytes up of one visit, over those of that", [up], "times", 1.0, up <= 1),
    ]


def _kept(title: str, name: str, curves: dict[str, ArmCurve], exact: float) -> list[Figure]:
    """What forward mode adds, and its share of what exact gradients add where that is large enough to have shares."""
    added = _differences(curves[name], curves["visit"])
    kind = ARMS_HERE[name].kind.split(",")[0].removeprefix("slices by ")
    table = [_figure(f"{title}: added over one visit by {kind}", added, "points")]
    if exact >= DENOMINATOR:
        shares = [100 * gain / exact for gain in added]
        table.append(_figure(f"{title}: of it, kept by {kind}", shares, "%", KEPT, fmean(shares) >= KEPT))
    return table


def _end(name: str, curve: ArmCurve) -> Figure:
    finals = list(curve.finals().values())
    return _figure(f"{name} ({len(finals)} seed{'s' * (len(finals) > 1)})", finals, "%")


def _differences(one: ArmCurve, other: ArmCurve) -> list[float]:
    """Points that one arm ended above another, for each seed that both have."""
    ours, theirs = one.finals(), other.finals()
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _bytes_up(curve: ArmCurve) -> float:
    """Mean over seeds of the bytes that all devices sent in a run."""
    return fmean(record.points[-1].bytes_up for record in curve.records)


def _figure(
    name: str, values: Sequence[float], unit: str, reach: float | None = None, met: bool | None = None
) -> Figure:
    """The mean of some values, with their range."""
    low, mean, high = (round(value, 2) for value in (min(values), fmean(values), max(values)))
    return Figure(name, mean, unit, reach, met, low, high)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.one_visit", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", metavar="DIR")
    parser.add_argument("--output", type=Path, default=root / "build" / "learning", metavar="DIR")
    parser.add_argument("--tasks", default="trec,trec_fine,clinc150,banking77,newsgroups,injongo")
    parser.add_argument("--alphas", default="1.0,0.1", help="of the Dirichlet partitions")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS_HERE), help="only these")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args(argv)
    for given, known in ((arguments.arms, ARMS_HERE), (arguments.tasks, TASKS)):
        if unknown := set(given.split(",")) - set(known):
            parser.error(f"{min(unknown)!r} is none of {', '.join(known)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
