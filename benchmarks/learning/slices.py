"""`make bench-slices`: kinds of slices, ranks, exits and kept activations beside each other, on fleets of unlike caps.

    python -m benchmarks.learning.slices --tasks trec --seeds 0,1,2

All arms of a seed have the same devices, rows and rounds, exact gradients and the coordinator's server steps
(:mod:`benchmarks.learning.slice_fleet`). What was run before is kept in ``--output``; several processes may share it, a
seed each, and ``--table`` then makes the table of all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.harness.minilm import packaged_model
from benchmarks.harness.result_file import RESULTS, Figure, write_result
from benchmarks.learning.arms import LAST_BLOCKS
from benchmarks.learning.datasets import DEV_ROWS, TASKS, TaskData, languages
from benchmarks.learning.denominators import some_rows
from benchmarks.learning.one_visit import TITLES
from benchmarks.learning.slice_fleet import (
    BATCH,
    BLOCKS,
    SEQUENCE,
    SLOTS,
    FleetRun,
    Scores,
    SliceFleet,
    Values,
)
from coordinator.rounds.robustness import GroupScore, robustness_of
from edge_runtime.memory.plan import live_bytes
from edge_runtime.package.manifest import Variant
from edge_runtime.package.slices import encode_values
from export.model.load import is_trainable, load_model
from export.packaging.programs import ProgramOptions, dual_live_sets
from export.quantisation.stored import store
from export.slices.sliced_linear import SliceOptions

RESULT = "slices.json"
ROWS_PER_DEVICE, RANK, SMALL = 44, 8, 1 / 3
#: Half of the model, and all of it: where exits lie.
EXITS = (BLOCKS // 2, BLOCKS)
RANKS = (1, 2, 4, 8)
NOISE = 0.3
#: Draws at which predicted live sets are told.
DRAWS = (1, 4, 16)
KEPT = (96, 384, 1536)
#: Points within which arms count as equal, and a mixed fleet as good as one of large caps.
EQUAL, MIXED = 1.0, 1.5
#: Share of LoRA's uplink that sparse slices of density 1 % may take.
UPLINK = 0.1
#: The slices' rates: of LoRA-XS and LoRA the best of learning.md's grids on TREC; that of sparse slices was not tuned.
RATES = {"lora_xs": 0.2, "lora": 0.005, "sparse": 0.001}
#: Layers with slices where blocks are left early: queries and values of all but the first.
EVERY_BLOCK = tuple(
    f"layer.{block}.attention.self.{name}" for block in range(1, BLOCKS) for name in ("query", "value")
)
#: Languages of SIB-200 whose devices take part, and others.
SEEN, UNSEEN = ("eng_Latn", "deu_Latn", "fra_Latn"), ("spa_Latn", "ces_Latn", "fin_Latn")
Done = dict[str, dict[str, float]]
#: Figures by arm and seed.
Arms = dict[str, dict[int, dict[str, float]]]


def options(kind: str, rank: int = RANK, targets: Sequence[str] = LAST_BLOCKS) -> SliceOptions:
    """Slices at the linear layers of the last two blocks, or elsewhere."""
    if kind == "lora_xs":
        return SliceOptions(kind, rank=4, alpha=4.0, targets=tuple(targets))
    return SliceOptions(kind, rank=rank, alpha=float(rank), density=0.01, targets=tuple(targets))


class Bench:
    """All arms of one task at one seed.

    Args:
        files: the task's files.
        run: rounds and steps of all arms.
        seed: seed of devices, rows and draws.
        note: called with an arm's name and its figures as soon as there are some.
        done: names of the arms that were run before.
    """

    def __init__(
        self,
        files: TaskData,
        run: FleetRun,
        seed: int,
        note: Callable[[str, dict[str, float]], None],
        done: set[str],
    ) -> None:
        self._files, self._run, self._seed, self._note, self._done = files, run, seed, note, done
        self._prefixes: dict[tuple[int | None, int], dict[tuple[str, int], Any]] = {}

    def kinds(self) -> None:
        """LoRA-XS, LoRA at each rank alone, and sparse slices."""
        for kind, rank in (("lora_xs", 4), ("sparse", 0), *(("lora", rank) for rank in RANKS)):
            name = f"{kind} {rank}" if kind == "lora" else kind
            if name not in self._done:
                fleet = self._fleet(options(kind, rank or RANK))
                values = fleet.train(replace(self._run, rate=RATES[kind]), self._seed)
                self._note(name, _scores(fleet.evaluate(values)))

    def ranks(self) -> None:
        """One set of nested ranks, read at each; and fleets in which one device in three holds half of them."""
        fleets = {
            "dylora": {},
            "dylora mixed": {"small": SMALL},
            "dylora without": {"small": SMALL, "refused": True},
        }
        for name, changes in fleets.items():
            if f"{name} {RANK}" in self._done:
                continue
            fleet = self._fleet(options("lora"))
            run = replace(self._run, rate=RATES["lora"], ranks=RANK, **changes)
            values = fleet.train(run, self._seed)
            for rank in RANKS if name == "dylora" else (RANK // 2, RANK):
                self._note(f"{name} {rank}", _scores(fleet.evaluate(values, rank=rank)))

    def depths(self) -> None:
        """One set of slices behind whose blocks a text may leave, beside those trained for one depth alone."""
        arms: dict[str, tuple[int, ...]] = {"exits": EXITS, **{f"depth {leave}": (leave,) for leave in EXITS}}
        for name, exits in arms.items():
            if f"{name} at {exits[-1]}" in self._done:
                continue
            fleet = self._fleet(options("lora_xs", targets=EVERY_BLOCK), frozen=1)
            values = fleet.train(replace(self._run, rate=RATES["lora_xs"], exits=exits), self._seed)
            for leave in exits:
                self._note(f"{name} at {leave}", _scores(fleet.evaluate(values, leave=leave)))

    def activations(self) -> None:
        """Top-k activations on clean and on noisy labels; with all of them kept it is the dense model."""
        for kept in KEPT:
            for noise in (0.0, NOISE):
                name = f"top-k {kept} noise {noise:g}"
                if name not in self._done:
                    fleet = self._fleet(options("lora_xs"), None if kept == KEPT[-1] else kept)
                    run = replace(self._run, rate=RATES["lora_xs"], noise=noise)
                    self._note(name, _scores(fleet.evaluate(fleet.train(run, self._seed))))

    def sizes(self) -> None:
        """Bytes of each kind and rank, and what the last block's dual program holds at each number of activations."""
        classes = len(json.loads(self._files.labels.read_text("utf-8")))
        for kind, rank in (("lora_xs", 4), ("sparse", 0), *(("lora", rank) for rank in RANKS)):
            name = f"sizes {kind} {rank}" if kind == "lora" else f"sizes {kind}"
            if name not in self._done:
                model = load_model(packaged_model(), classes, options(kind, rank or RANK), features="mean")
                values = {n: p.detach() for n, p in model.module.named_parameters() if is_trainable(n)}
                self._note(name, _sizes(values))
        for kept in KEPT:
            if f"live {kept}" not in self._done:
                k = None if kept == KEPT[-1] else kept
                model = load_model(packaged_model(), classes, options("lora_xs"), features="mean", mlp_topk=k)
                stored = store(model, "int8")
                chosen = ProgramOptions(SEQUENCE, ("row_int8",), with_adjoint=False, executorch_limit=None)
                live = Variant("", (), live=dual_live_sets(stored, chosen)["row_int8"])
                held = {f"{draws} draws": live_bytes(live, 1, SEQUENCE, draws) for draws in DRAWS}
                self._note(f"live {kept}", held)

    def languages(self) -> None:
        """Devices by language: robustness over languages whose devices took part and over others, by kind."""
        for kind in ("lora_xs", "lora", "sparse"):
            if f"languages {kind}" in self._done:
                continue
            fleet = self._fleet(options(kind))
            shares = fleet.shares_of_owners(SEEN)
            head = fleet.train(replace(self._run, rate=0.0), self._seed, shares)
            after = fleet.evaluate(
                fleet.train(replace(self._run, rate=RATES[kind]), self._seed, shares)
            ).by_owner
            before = fleet.evaluate(head).by_owner
            found = robustness_of(
                [
                    GroupScore(owner, owner in SEEN, 1, before[owner] / 100, after[owner] / 100)
                    for owner in after
                ]
            )
            told = {"seen": found.seen, "unseen": found.unseen, "crrm_standin": found.crrm_standin}
            self._note(
                f"languages {kind}", {key: 100 * value for key, value in told.items() if value is not None}
            )

    def _fleet(self, chosen: SliceOptions, mlp_topk: int | None = None, frozen: int = 4) -> SliceFleet:
        kept = self._prefixes.setdefault((mlp_topk, frozen), {})
        return SliceFleet(self._files, ROWS_PER_DEVICE, chosen, mlp_topk=mlp_topk, frozen=frozen, kept=kept)


def _scores(scores: Scores) -> dict[str, float]:
    return {"accuracy": scores.accuracy, "ece": scores.calibration_error}


def _sizes(values: Values) -> dict[str, float]:
    """Of the slices alone: bytes of a change as a device sends it, and of the server's two moments."""
    slices = {name: value.numpy() for name, value in values.items() if not name.startswith("head.")}
    numbers = sum(value.size for value in slices.values())
    return {"uplink": len(encode_values(slices)), "numbers": numbers, "state": 2 * 4 * numbers}


def rows(title: str, found: Arms) -> list[Figure]:
    """The table of one task, from each arm's figures by seed."""
    names = sorted(found)
    table = [
        _figure(f"{title}: {name} ({len(found[name])} seeds)", _of(found, name), "%")
        for name in names
        if _of(found, name)
    ]
    for name in names:
        if sizes := _of(found, name, "uplink"):
            kind, state = name.removeprefix("sizes "), _of(found, name, "state")
            table.append(_figure(f"{title}: {kind}: uplink of the slices", [n / 1e3 for n in sizes], "kB"))
            table.append(
                _figure(f"{title}: {kind}: Adam's state at the server", [n / 1e3 for n in state], "kB")
            )
    return [
        *table,
        *_live(title, found),
        *_claims(title, found),
        *_activations(title, found),
        *_languages(title, found),
    ]


def _claims(title: str, found: Arms) -> Iterator[Figure]:
    """Sparse slices, ranks, mixed caps and exits beside what each is compared with, over the seeds that both have."""
    if uplink := _pairs(found, "sizes sparse", "sizes lora 8", "uplink"):
        share = [ours / theirs for ours, theirs in uplink]
        yield _figure(
            f"{title}: uplink of sparse at 1 %, over LoRA r=8", share, "times", UPLINK, max(share) <= UPLINK
        )
    compared: list[tuple[str, str, str, float | None]] = [
        ("sparse at 1 % over LoRA r=8", "sparse", "lora 8", EQUAL),
        *(
            (f"DyLoRA read at rank {r} over LoRA r={r} alone", f"dylora {r}", f"lora {r}", EQUAL)
            for r in RANKS
        ),
        ("fleet of mixed caps over a fleet of large caps", f"dylora mixed {RANK}", f"dylora {RANK}", MIXED),
        (
            "small devices refused, over a fleet of large caps",
            f"dylora without {RANK}",
            f"dylora {RANK}",
            None,
        ),
        *(
            (f"exits read at block {e} over that depth", f"exits at {e}", f"depth {e} at {e}", None)
            for e in EXITS
        ),
    ]
    for words, name, other, within in compared:
        if gap := _apart(found, name, other):
            met = None if within is None else fmean(gap) >= -within
            yield _figure(f"{title}: {words}", gap, "points", None if within is None else -within, met)


def _live(title: str, found: Arms) -> Iterator[Figure]:
    for draws in DRAWS:
        for kept in KEPT:
            if held := _of(found, f"live {kept}", f"{draws} draws"):
                words = f"predicted live set of a block, {kept} of {KEPT[-1]} activations"
                name = f"{title}: {words}, {SEQUENCE} tokens, {draws} draws"
                yield _figure(name, [n / 1e6 for n in held], "MB")


def _activations(title: str, found: Arms) -> Iterator[Figure]:
    for kept in KEPT[:-1]:
        for noise in (0.0, NOISE):
            name, dense = (f"top-k {k} noise {noise:g}" for k in (kept, KEPT[-1]))
            words = f"{title}: {kept} of {KEPT[-1]} activations, {noise:.0%} of labels wrong, over dense"
            for key, what in (("accuracy", "accuracy"), ("ece", "calibration error")):
                if gap := _apart(found, name, dense, key):
                    yield _figure(f"{words}: {what}", gap, "points")


def _languages(title: str, found: Arms) -> Iterator[Figure]:
    for name in sorted(found):
        for key in ("seen", "unseen", "crrm_standin"):
            if values := _of(found, name, key):
                yield _figure(f"{title}: {name.split()[1]}, robustness, {key} (a stand-in)", values, "%")


def _of(found: Arms, name: str, key: str = "accuracy") -> list[float]:
    return [figures[key] for _, figures in sorted(found.get(name, {}).items()) if key in figures]


def _pairs(found: Arms, name: str, other: str, key: str) -> list[tuple[float, float]]:
    ours, theirs = found.get(name, {}), found.get(other, {})
    return [(ours[seed][key], theirs[seed][key]) for seed in sorted(ours.keys() & theirs.keys())]


def _apart(found: Arms, name: str, other: str, key: str = "accuracy") -> list[float]:
    return [ours - theirs for ours, theirs in _pairs(found, name, other, key)]


def _figure(
    name: str, values: Sequence[float], unit: str, reach: float | None = None, met: bool | None = None
) -> Figure:
    low, mean, high = (round(value, 3) for value in (min(values), fmean(values), max(values)))
    return Figure(name, mean, unit, reach, met, low, high)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the result file; returns a process exit code."""
    arguments = _arguments(argv)
    run = FleetRun(rounds=arguments.rounds, steps=arguments.steps)
    for task in () if arguments.table else arguments.tasks.split(","):
        files = _first_dev_rows(task, arguments)
        for seed in map(int, arguments.seeds.split(",")):
            kept = arguments.output / f"slices-{task}-{arguments.rounds}x{arguments.steps}-seed{seed}.json"
            done: Done = json.loads(kept.read_text("utf-8")) if kept.exists() else {}

            def note(name: str, figures: dict[str, float], done: Done = done, kept: Path = kept) -> None:
                done[name] = figures
                kept.write_text(json.dumps(done), encoding="utf-8")
                print(kept.stem, name, figures, flush=True)

            bench = Bench(files, run, seed, note, set(done))
            for part in ("languages",) if task == SIB else arguments.parts.split(","):
                getattr(bench, part)()
    found = _found(arguments)
    table = [
        figure for task, arms in found.items() for figure in rows({**TITLES, SIB: "SIB-200"}[task], arms)
    ]
    command = "python -m benchmarks.learning.slices " + " ".join(argv or sys.argv[1:])
    conditions = {
        "devices a round": SLOTS,
        "rows a step": BATCH,
        "rates": RATES,
        "dev rows": arguments.dev_rows,
    }
    write_result(RESULTS / RESULT, command, 1, table, conditions)
    return 0


PARTS = ("sizes", "kinds", "ranks", "depths", "activations")
#: The task of :meth:`Bench.languages`, which is that part alone.
SIB = "sib200"


def _found(arguments: argparse.Namespace) -> dict[str, Arms]:
    """Figures of all seeds that were run at these rounds and steps, by task."""
    found: dict[str, Arms] = {}
    for path in sorted(arguments.output.glob(f"slices-*-{arguments.rounds}x{arguments.steps}-seed*.json")):
        task, seed = path.stem.split("-")[1], int(path.stem.rpartition("seed")[2])
        for name, figures in json.loads(path.read_text("utf-8")).items():
            found.setdefault(task, {}).setdefault(name, {})[seed] = figures
    return found


def _first_dev_rows(task: str, arguments: argparse.Namespace) -> TaskData:
    """A task's files with so many dev rows, chosen by a permutation; of languages all of them."""
    if task == SIB:
        return languages(arguments.data, arguments.output / "data" / SIB, SEEN, UNSEEN)
    files = some_rows(task, arguments.data, arguments.output, ROWS_PER_DEVICE)
    lines = files.dev.read_text("utf-8").splitlines(keepends=True)
    dev = files.dev.with_name(f"dev-{arguments.dev_rows}.jsonl")
    dev.write_text("".join(lines[: arguments.dev_rows]), encoding="utf-8")
    return TaskData(files.train, dev, files.labels)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.slices", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", metavar="DIR")
    parser.add_argument("--output", type=Path, default=root / "build" / "learning", metavar="DIR")
    parser.add_argument("--tasks", default=f"trec,banking77,clinc150,{SIB}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=FleetRun().rounds)
    parser.add_argument("--steps", type=int, default=FleetRun().steps, help="batches of a device a round")
    parser.add_argument("--dev-rows", type=int, default=DEV_ROWS)
    parser.add_argument("--parts", default=",".join(PARTS), help="of the table, in the order they are run")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of what is there")
    arguments = parser.parse_args(argv)
    for given, known in ((arguments.tasks, (*TASKS, SIB)), (arguments.parts, PARTS)):
        if unknown := set(given.split(",")) - set(known):
            parser.error(f"{min(unknown)!r} is none of {', '.join(known)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
