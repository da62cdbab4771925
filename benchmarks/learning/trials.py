"""`make bench-trials`: what lessens noise, judged by learning before it is built.

    python -m benchmarks.learning.trials --seeds 0,1,2

Each trial is forward mode of 8 draws along dealt directions on TREC with one thing changed: where the server's rate
comes from, when draws are spent, which frozen factors the cores stand between, or how many of the devices have exact
gradients. All runs are those of :mod:`benchmarks.learning.torch_fleet`; what was run before is kept in ``--output``,
and in the result file rows of other trials stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from benchmarks.estimators.methods import flattened, make_task
from benchmarks.harness.result_file import EARLIER, RESULTS, Figure, earlier_rows, write_result
from benchmarks.learning.arms import ADAM, HEAD_RATES, rate_of
from benchmarks.learning.datasets import prepare
from benchmarks.learning.run import ROUNDS, ROWS_PER_DEVICE
from benchmarks.learning.torch_fleet import BATCH, SLOTS, STEPS, FactorMaker, Matrix, TorchFleet
from benchmarks.learning.torch_server import TorchServer
from coordinator.aggregation.mean import Contribution, mean_delta
from coordinator.aggregation.own_rate import OwnRate
from coordinator.config import ServerOptimizerConfig
from coordinator.rounds.stated_variance import variance_factors
from edge_runtime.package.slices import shapes
from edge_runtime.training.line import along_line
from edge_runtime.training.tangents import draw_tangents
from export.slices.lora_xs import factors, moved, whitened_factors

RESULT = "trials.json"
TASK, ALPHA, DRAWS = "trec", 1.0, 8
#: Directions that are drawn once and kept: they do not depend on the values.
Tangents = dict[tuple[int, int, int, int, int], Matrix]


@dataclass(frozen=True)
class Trial:
    """One thing changed.

    Attributes:
        words: what tables call it.
        rate: the slices' rate; None lets it set itself.
        start: where such a rate starts.
        draws: number of draws in each third of the run.
        make: frozen factors of the cores; None takes those of the package.
        exact: share of the devices that have exact gradients.
    """

    words: str
    rate: float | None = rate_of(TASK, "decks")
    start: float = OwnRate().rate
    draws: tuple[int, int, int] = (DRAWS,) * 3
    make: FactorMaker | None = None
    exact: float = 0.0


def flat_factors(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors whitened by a layer's inputs, with columns of ``up`` of one length: all entries move the output alike."""
    up, down = whitened_factors(weight, moment, rank, 1.0)
    up = up.double() / up.double().norm(dim=0)
    own_up, own_down = factors(weight, rank, 1.0)
    size = moved(own_up.double(), own_down.double(), moment) / moved(up, down.double(), moment)
    return (up * size).float(), down


def principal(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """EVA's inputs (arXiv 2410.07170): ``down`` the inputs' leading directions, ``up`` what the layer makes of them."""
    _, vectors = torch.linalg.eigh(moment.double())
    down = vectors[:, -rank:].T
    up = weight.double() @ down.T
    own_up, own_down = factors(weight, rank, 1.0)
    size = moved(own_up.double(), own_down.double(), moment) / moved(up, down, moment)
    return (up * size).float(), down.float()


TRIALS: dict[str, Trial] = {
    "tuned": Trial("the rate of the grid, 0.2"),
    "tuned-half": Trial("half that rate", rate=0.1),
    "auto": Trial("a rate that sets itself", rate=None),
    "auto-small": Trial("the same from a tenth of its start", rate=None, start=0.005),
    "auto-large": Trial("the same from ten times its start", rate=None, start=0.5),
    "late": Trial("4, 8 and 12 draws", draws=(4, 8, 12)),
    "early": Trial("12, 8 and 4 draws", draws=(12, 8, 4)),
    "whitened": Trial("factors of W C^½", make=partial(whitened_factors, scale=1.0)),
    "whitened-flat": Trial("the same, all entries alike", make=flat_factors),
    "principal": Trial("the inputs' leading directions (EVA)", make=principal),
    "exact-25": Trial("a quarter of the devices exact", exact=0.25),
    "exact-50": Trial("half of the devices exact", exact=0.5),
    "exact-100": Trial("all devices exact", exact=1.0),
}
BASE = "tuned"
#: Points below the tuned rate within which a rate that sets itself is to end.
WITHIN = 0.5


def run(fleet: TorchFleet, trial: Trial, seed: int, tangents: Tangents) -> dict[str, Any]:
    """One run of 20 rounds; accuracy in percent and loss on dev rows at its end, and the rates that it took."""
    shares = fleet.shares(ALPHA, seed)
    exact_devices = np.random.default_rng([seed, 1]).permutation(SLOTS * 10) < round(trial.exact * SLOTS * 10)
    head = ServerOptimizerConfig("adam", rate=HEAD_RATES[TASK], tau=1e-3)
    server = TorchServer(fleet, ServerOptimizerConfig(**ADAM), head)
    own, last = OwnRate(rate=trial.start), np.zeros(fleet.size, np.float32)
    rates = []
    for number in range(ROUNDS):
        draws, share = trial.draws[3 * number // ROUNDS], 1 - number / ROUNDS
        rows = fleet.round_rows(shares, seed, number)
        found = server.gradients(rows)
        asked = np.random.default_rng([seed, number]).permutation(SLOTS * 10)[:SLOTS]
        mean = _mean(fleet, found.gradients, seed, number, draws, exact_devices[asked], tangents)
        if trial.rate is None:
            own = own.measured(*along_line(found.gradients @ last, found.losses))
        rate = own.rate if trial.rate is None else trial.rate
        rates.append(rate)
        before = server.cores
        server.move(mean, found, share, rate)
        last, own = server.cores - before, own.stepped(share)
    accuracy, loss = server.evaluate()
    return {"accuracy": accuracy, "loss": loss, "rates": rates}


def _mean(
    fleet: TorchFleet,
    gradients: Matrix,
    seed: int,
    number: int,
    draws: int,
    is_exact: Sequence[bool],
    kept: Tangents,
) -> Matrix:
    """The round's mean gradient (d,): each device's estimate, or its exact mean, weighed by what it states."""
    by_step = gradients.reshape(SLOTS, STEPS, BATCH, -1)
    names = tuple(spec.name for spec in fleet.specs)
    task = msgspec.structs.replace(make_task(names, number, 0, seed, draws), directions="dealt")
    noisy = variance_factors(msgspec.structs.replace(task, update="best"), fleet.specs, "forward", draws)
    given = []
    for slot in range(SLOTS):
        if is_exact[slot]:
            flat = by_step[slot].mean(axis=(0, 1))
        else:
            flat = np.zeros(fleet.size, np.float32)
            own = msgspec.structs.replace(task, slot=slot)
            for local in range(STEPS):
                place = (seed, number, slot, local, draws)
                if place not in kept:
                    drawn = draw_tangents(own, fleet.specs, local, range(BATCH))
                    kept[place] = flattened(drawn).astype(np.float16)
                directions = kept[place].astype(np.float32)
                jvps = (directions * by_step[slot, local][None]).sum(axis=2)
                flat += jvps.ravel() @ directions.reshape(-1, fleet.size) / (draws * BATCH * STEPS)
        delta = dict(zip(shapes(fleet.specs), flat.reshape(len(names), -1), strict=True))
        variance = {} if is_exact[slot] or not any(is_exact) else noisy
        given.append(Contribution(STEPS * BATCH, delta, slot=slot, variance=variance))
    means = mean_delta(given)
    return np.concatenate([means[name] for name in shapes(fleet.specs)]).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the result file; returns a process exit code."""
    arguments = _arguments(argv)
    names, seeds = arguments.trials.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    kept = arguments.output / "trials.json"
    done: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    if any(f"{name} {seed}" not in done for name in names for seed in seeds):
        files = prepare(TASK, arguments.data, arguments.output / "data" / TASK)
        fleet = TorchFleet(files, ROWS_PER_DEVICE[TASK])
        for seed in seeds:
            tangents: Tangents = {}
            for name in names:
                if f"{name} {seed}" in done:
                    continue
                trial = TRIALS[name]
                fleet.reset(trial.make or (lambda weight, _, rank: factors(weight, rank, 1.0)))
                found = done[f"{name} {seed}"] = run(fleet, trial, seed, tangents)
                kept.write_text(json.dumps(done), encoding="utf-8")
                print(f"{name} {seed}: {found['accuracy']:.1f} %, loss {found['loss']:.4f}", flush=True)
    by_name = {
        name: {int(place.split()[1]): found for place, found in done.items() if place.split()[0] == name}
        for name in TRIALS
    }
    figures = table_rows({name: found for name, found in by_name.items() if found})
    measured = [
        f"{_words(name)}{ending}" for name, found in by_name.items() if found for ending in (" (", ":")
    ]
    others, commits = earlier_rows(RESULTS / RESULT, measured)
    rates = {place: [round(rate, 4) for rate in found["rates"]] for place, found in done.items()}
    conditions = {"rates": rates, EARLIER: commits}
    command = "python -m benchmarks.learning.trials " + " ".join(argv or sys.argv[1:])
    write_result(RESULTS / RESULT, command, 1, [*others, *figures], conditions)
    return 0


def table_rows(by_name: dict[str, dict[int, dict[str, Any]]]) -> list[Figure]:
    """Where each trial ended, and its difference to the tuned rate on the seeds that both have."""
    rows = []
    base = by_name.get(BASE, {})
    for name, found in by_name.items():
        words = _words(name)
        ends = [found[seed]["accuracy"] for seed in sorted(found)]
        rows.append(_figure(f"{words} ({len(ends)} seed{'s' * (len(ends) > 1)})", ends, "%", 2))
        rows.append(_figure(f"{words}: loss", [found[seed]["loss"] for seed in sorted(found)], "", 4))
        both = sorted(found.keys() & base.keys())
        if name != BASE and both:
            gains = [found[seed]["accuracy"] - base[seed]["accuracy"] for seed in both]
            reach = -WITHIN if name == "auto" else None
            rows.append(_figure(f"{words}: over the tuned rate", gains, "points", 2, reach))
    return rows


def _words(name: str) -> str:
    return f"TREC, 8 draws: {TRIALS[name].words}"


def _figure(name: str, values: Sequence[float], unit: str, digits: int, reach: float | None = None) -> Figure:
    low, mean, high = (round(value, digits) for value in (min(values), fmean(values), max(values)))
    return Figure(name, mean, unit, reach, None if reach is None else mean >= reach, low, high)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.trials", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", metavar="DIR")
    parser.add_argument("--output", type=Path, default=root / "build" / "learning", metavar="DIR")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--trials", default=",".join(TRIALS), help="only these")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.trials.split(",")) - set(TRIALS):
        parser.error(f"{min(unknown)!r} is none of {', '.join(TRIALS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
