"""`make bench-learning`: how much of backpropagation's gain forward mode keeps, on fleets of 100 simulated devices.

    python -m benchmarks.learning.run --stage rates    # every arm's grid of rates, on a seed of its own
    python -m benchmarks.learning.run --stage choices  # our arm with one setting changed at a time, on the same seed
    python -m benchmarks.learning.run                  # arms, seeds and partitions at the chosen rates; the tables
    python -m benchmarks.learning.run --quick          # one task, one seed and few rounds, in minutes

After the first stage the best rates are written into ``benchmarks.learning.arms`` by hand.

Gain kept = (arm - head only) / (backpropagation on the same slices - head only), by accuracy of the global model on dev
rows after the last round, on the same devices, rounds, rows and seeds. The work is kept in ``--output``, and a bench
that was stopped goes on there. For each task and partition it has a folder of arm records, which
``edge-coordinator simulate`` writes, with its comparison page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.minilm import packaged_model
from benchmarks.learning.arms import (
    ARMS,
    CHOICES,
    DECODER,
    DECODER_ARMS,
    DECODER_PACKAGES,
    HEAD_RATES,
    PACKAGES,
    REPORTS,
    BenchArm,
    arms_of,
    rate_of,
)
from benchmarks.learning.datasets import prepare, speakers
from benchmarks.learning.tables import write_tables
from coordinator.simulation.config import merged
from export.cli import main as export_command

#: Rows of each device, by task: TREC has 4,452 training rows for 100 devices.
ROWS_PER_DEVICE = {
    "trec": 44,
    "trec_fine": 44,
    "sst2": 64,
    "ag_news": 64,
    "banking77": 64,
    "clinc150": 100,
    "newsgroups": 64,
    "injongo": 100,
    "sib200": 100,
}
ROUNDS, QUICK_ROUNDS, RATE_ROUNDS = 20, 6, 16
#: The seed of the grid; no result comes from it.
RATE_SEED = 100
EVALUATIONS = 5


@dataclass(frozen=True)
class ArmSweep:
    """What one call of ``edge-coordinator simulate`` runs.

    Attributes:
        folder: folder for the records.
        task: data set to train on.
        alpha: Dirichlet parameter of the partition over devices; the smaller, the more unlike.
        seeds: seeds to run each arm with.
        rounds: number of rounds.
        arms: each arm with its rate, by name.
    """

    folder: Path
    task: str
    alpha: float
    seeds: tuple[int, ...]
    rounds: int
    arms: dict[str, tuple[BenchArm, float]]

    def config(self) -> str:
        """The simulation's configuration as TOML."""
        run: dict[str, Any] = {
            "rounds": self.rounds,
            "devices_per_round": 10,
            "steps": 5,
            "batch_size": 8,
            "sequence_limit": 64,
            "split": "whole",
            "rate_decay": "linear",
            "local_optimizer": {"name": "accumulate", "slice_rate": 0.2, "head_rate": 0.2},
            "evaluation": _evaluation(self.rounds),
        }
        data = {"train": f"data/{self.task}/train.jsonl", "dev": f"data/{self.task}/dev.jsonl"}
        if self.task == DECODER:
            run["train_head"] = False
            data["partition"] = "natural"
        else:
            rows = ROWS_PER_DEVICE[self.task]
            data |= {"partition": "dirichlet", "alpha": self.alpha, "rows_per_device": rows}
            rate = HEAD_RATES.get(self.task, HEAD_RATES["trec"])
            run["server_optimizer"] = {"head": {"name": "adam", "rate": rate, "tau": 1e-3}}
        fleet = {"devices": 100, "cap": "512M", "arithmetic": "row_int8", "prefix_cache": "3G"}
        tables: list[tuple[str, dict[str, Any]]] = [("fleet", fleet), ("data", data), ("run", run)]
        if {"head", "backprop"} <= self.arms.keys():
            tables.append(("comparison", {"head_only": "head", "reference": "backprop"}))
        lines = [f"name = {_toml(self.task)}", f"seeds = {_toml(list(self.seeds))}"]
        for name, table in tables:
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        for name, (arm, rate) in self.arms.items():
            settings = arm.with_rate(rate)
            if arm.rounds_times > 1:
                rounds = self.rounds * arm.rounds_times
                settings = merged(settings, {"rounds": rounds, "evaluation": _evaluation(rounds)})
            lines += ["[[arms]]", f"name = {_toml(name)}", f"kind = {_toml(arm.kind)}"]
            lines += [f'package = "packages/{self.task}-{arm.package}"', f"run = {_toml(settings)}"]
        return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for; returns a process exit code."""
    arguments = _arguments(argv)
    tasks = arguments.tasks.split(",")
    # 1. Rows and packages, made once.
    for task in tasks:
        folder = arguments.output / "data" / task
        packages = sorted({arm.package for arm in _chosen(arguments, task).values()})
        if task == DECODER:
            _, dev = speakers(arguments.data, folder)
            model = stories(arguments.data, arguments.output)
            for name in packages:
                export_package(
                    arguments.output, task, name, model, dev, ["--task", "causal_lm", *DECODER_PACKAGES[name]]
                )
            continue
        files = prepare(task, arguments.data, folder)
        for name in packages:
            options = ["--labels", str(files.labels), *PACKAGES[name]]
            export_package(arguments.output, task, name, packaged_model(), files.dev, options)
    # 2. Sweeps, some arms at a time.
    sweeps = {"rates": _rate_sweeps, "choices": _choice_sweeps, "arms": _arm_sweeps}[arguments.stage]
    for sweep in sweeps(arguments, tasks):
        path = arguments.output / f"{sweep.folder.name}.toml"
        path.write_text(sweep.config())
        fill(path, sweep, arguments.processes)
    # 3. Tables of what is there.
    if arguments.stage == "arms" and not arguments.quick:
        write_tables(arguments.output, "python -m benchmarks.learning.run " + " ".join(argv or sys.argv[1:]))
    return 0


def _rate_sweeps(arguments: argparse.Namespace, tasks: list[str]) -> list[ArmSweep]:
    sweeps = []
    for task in tasks:
        grid = {
            f"{name}-{rate:g}": (arm, rate)
            for name, arm in _chosen(arguments, task).items()
            for rate in arm.grid
        }
        folder = arguments.output / f"rates-{task}"
        sweeps.append(ArmSweep(folder, task, 1.0, (RATE_SEED,), RATE_ROUNDS, grid))
    return sweeps


def _choice_sweeps(arguments: argparse.Namespace, tasks: list[str]) -> list[ArmSweep]:
    arms = {
        "ours": (ARMS["ours"], rate_of("trec", "ours")),
        **{name: (arm, rate_of("trec", "ours")) for name, arm in CHOICES.items()},
    }
    return [
        ArmSweep(arguments.output / f"choices-{task}", task, 1.0, (RATE_SEED,), RATE_ROUNDS, arms)
        for task in tasks
    ]


def _arm_sweeps(arguments: argparse.Namespace, tasks: list[str]) -> list[ArmSweep]:
    seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    rounds = QUICK_ROUNDS if arguments.quick else arguments.rounds
    kind = "quick" if arguments.quick else "arms"
    reports = {name: (arm, rate_of("trec", "ours")) for name, arm in REPORTS.items()}
    sweeps = []
    for task in tasks:
        arms = {name: (arm, rate_of(task, name)) for name, arm in _chosen(arguments, task).items()}
        alphas = arguments.alphas.split(",") if task != DECODER else ["natural"]
        for alpha in alphas:
            folder = arguments.output / f"{kind}-{task}-{alpha}"
            number = 1.0 if task == DECODER else float(alpha)
            sweeps.append(ArmSweep(folder, task, number, seeds, rounds, arms))
        if task != DECODER:
            folder = arguments.output / f"reports-{task}"
            sweeps.append(ArmSweep(folder, task, 1.0, seeds[:1], 2, reports))
    return sweeps


def _chosen(arguments: argparse.Namespace, task: str) -> dict[str, BenchArm]:
    """Those of the task's arms that are asked for."""
    asked = arguments.arms.split(",") if arguments.arms else None
    arms = arms_of(task)
    return {name: arm for name, arm in arms.items() if asked is None or name in asked}


def stories(data: Path, output: Path) -> Path:
    """stories260K as a Hugging Face folder, made once."""
    model = output / "stories260k"
    source = data / "model_stories260k"
    if not model.exists():
        files = [str(source / "stories260K.bin"), str(source / "tok512.bin")]
        if code := export_command(["llama2c", *files, "--output", str(model)]):
            raise SystemExit(code)
    return model


def export_package(
    output: Path, task: str, name: str, model: Path, dev: Path, options: Sequence[str]
) -> None:
    """Export a package for a task with the command line, unless that was done."""
    package, key = output / "packages" / f"{task}-{name}", output / "publisher.key"
    if package.exists():
        return
    if not key.exists():
        export_command(["key", str(key)])
    files = ["--check-data", str(dev), "--output", str(package), "--key", str(key)]
    if code := export_command(["package", str(model), *files, "--sequence-limit", "64", *options]):
        raise SystemExit(code)


def fill(config: Path, sweep: ArmSweep, processes: int) -> None:
    """Fill the sweep's folder, its arms dealt out to processes, and then write its page."""
    command = [
        sys.executable,
        "-m",
        "coordinator.cli",
        "simulate",
        str(config),
        "--output",
        str(sweep.folder),
    ]
    names = list(sweep.arms)
    running = [
        subprocess.Popen([*command, "--threads", "1", "--arms", ",".join(names[first::processes])])
        for first in range(min(processes, len(names)))
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"error: a simulation of {config} failed; its lines above tell why")
    subprocess.run([*command, "--page"], check=True)


def _evaluation(rounds: int) -> dict[str, int]:
    return {"every_rounds": max(1, rounds // EVALUATIONS)}


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", metavar="DIR")
    parser.add_argument("--output", type=Path, default=root / "build" / "learning", metavar="DIR")
    parser.add_argument("--stage", choices=("rates", "choices", "arms"), default="arms")
    parser.add_argument("--tasks", default=",".join((*HEAD_RATES, DECODER)))
    parser.add_argument("--alphas", default="1.0,0.1", help="of the Dirichlet partitions")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default="", help="only these; a task passes over those that it has not")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="TREC, seed 0, the three arms of the measure")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.arms.split(",")) - {"", *ARMS, *DECODER_ARMS}
    if unknown:
        parser.error(f"no arm is called {min(unknown)!r}; there are {', '.join((*ARMS, *DECODER_ARMS))}")
    if arguments.quick:
        arguments.tasks, arguments.alphas, arguments.seeds = "trec", "1.0", "0"
        arguments.arms = "head,backprop,ours"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
