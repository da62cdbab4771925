"""`make demo-reference`: what the demo is compared with, on the same rounds, data and seeds.

Three arms run in this process, with the coordinator's own selection, assignment, aggregation and server optimisers:

* ``forward``: the worker's own training; its accuracy differs from the demo's by rounding alone (threads, CPU);
* ``head_only``: the same without slices;
* ``backpropagation``: the exact gradient of the same slices, by torch on the same quantised weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.harness.torch_gradient import slice_gradient
from coordinator.aggregation.mean import Contribution, apply_deltas, mean_delta
from coordinator.config import RunConfig, run_config
from coordinator.rounds.assignment import assign
from coordinator.rounds.memory_requirements import required_bytes
from coordinator.rounds.selection import SelectableDevice, draw_order, fit
from edge_runtime.data.batches import Tokenizer, draw_batches, load_rows, make_batch
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.prepare import prepare as prepare_package
from edge_runtime.memory.meter import Meter
from edge_runtime.package.manifest import ARITHMETICS, Arithmetic
from edge_runtime.package.slices import Values, decode_values, encode_values, shapes
from edge_runtime.protocol.messages import Task
from edge_runtime.protocol.signing import generate_key
from edge_runtime.training.gradient import head_gradient
from edge_runtime.training.optimizers import make_optimizer
from edge_runtime.worker.jobs import EvaluateJob, TrainJob
from edge_runtime.worker.main import evaluate, train
from examples.banking77.demo import packaged_model
from examples.banking77.prepare import HERE, prepare
from export.model.labels import read_labels
from export.model.load import load_model
from export.model.slices import SliceOptions
from export.packaging.export_package import ExportOptions, export_package
from export.packaging.torch_reference import TorchReference
from export.quantisation.stored import store

ARMS = ("head_only", "backpropagation", "forward")
RESULT = HERE.parents[1] / "benchmarks" / "results" / "demo-reference.json"
CAP_BYTES = 1 << 40
#: Trains one task from the given values on a device's file; returns the number of examples and the values' change.
LocalTraining = Callable[[Task, Values, Path], tuple[int, Values]]


class Simulation:
    """One fleet, package and run configuration; :meth:`run` plays an arm."""

    def __init__(self, folder: Path, config: RunConfig, threads: int, arithmetic: Arithmetic | None) -> None:
        self.folder, self.config, self.threads = folder, config, threads
        self.split = prepare(folder / "data")
        self.labels = read_labels(self.split.labels)
        self.slice_options = SliceOptions()
        self.key = generate_key()
        self.model = packaged_model()
        texts = tuple(row.text for row in load_rows(self.split.dev, self.labels))
        options = ExportOptions(
            model=self.model,
            labels=self.labels,
            output=folder / "package",
            slices=self.slice_options,
            sequence_limit=config.sequence_limit,
            quantisation="int8",
            check_texts=texts,
        )
        self.package = export_package(options, self.key, progress=lambda _: None)
        self.prepared = folder / "prepared"
        prepare_package(self.package, self.prepared, OnnxEngine(threads), arithmetic)
        manifest = self.package.manifest
        self.slices = tuple(spec.name for spec in manifest.slices if spec.kind != "head")
        self.state = folder / "state.safetensors"

    def run(self, name: str, slices: tuple[str, ...], local: LocalTraining) -> dict[str, Any]:
        """Play all rounds of an arm.

        Args:
            name: what lines on the terminal call it.
            slices: names of the slices that it trains.
            local: training of one task on one device.

        Returns:
            ``accuracy`` and ``loss`` at the end, the ``seconds`` it took and its ``curve``.
        """
        started, manifest, config = time.monotonic(), self.package.manifest, self.config
        values = decode_values(self.package.path(manifest.initial_state).read_bytes(), manifest.slices)
        moments: dict[str, Any] = {}
        candidates = [
            SelectableDevice(str(number), f"device-{number:02d}", CAP_BYTES, 0)
            for number in range(len(self.split.devices))
        ]
        curve = []
        for number in range(config.rounds):
            slots = assign(slices, config.devices_per_round, number)
            # Devices get the slots they get in the demo, where every slot needs what forward mode needs.
            needs = assign(self.slices, config.devices_per_round, number)
            order = draw_order(candidates, config.seed, number)
            seats = fit(
                order, len(slots), lambda slot, _, n=needs: required_bytes(manifest, config, n[slot], 0)
            )
            contributions = [
                Contribution(
                    *local(
                        self._task(number, slot, names),
                        values,
                        self.split.devices[int(seats[slot].device_id)],
                    )
                )
                for slot, names in enumerate(slots)
            ]
            values, moments = apply_deltas(
                values,
                moments,
                mean_delta(contributions),
                head=frozenset(shapes([manifest.head])),
                optimizers=config.server_optimizer,
            )
            every = config.evaluation.every_rounds if config.evaluation else config.rounds
            if (number + 1) % every == 0 or number + 1 == config.rounds:
                accuracy, loss = self.evaluate(values)
                curve.append({"round": number, "accuracy": accuracy, "loss": loss})
                print(f"{name:22} round {number:3}  accuracy {accuracy:.3f}  loss {loss:.3f}", flush=True)
        return {
            "accuracy": curve[-1]["accuracy"],
            "loss": curve[-1]["loss"],
            "seconds": round(time.monotonic() - started, 1),
            "curve": curve,
        }

    def evaluate(self, values: Values) -> tuple[float, float]:
        """Accuracy and loss on the dev split, by the runtime."""
        self.state.write_bytes(encode_values(values))
        job = EvaluateJob(
            str(self.package.folder),
            self.package.sha256,
            str(self.prepared),
            str(self.state),
            str(self.split.dev),
            self.config.sequence_limit,
            CAP_BYTES,
            self.threads,
        )
        outcome = evaluate(job, Meter())
        return outcome.accuracy, outcome.mean_loss

    def by_the_worker(self, task: Task, values: Values, data: Path) -> tuple[int, Values]:
        """Local training exactly as a device does it: forward mode for slices, exact gradient for the head."""
        self.state.write_bytes(encode_values(values))
        change = self.folder / "change.safetensors"
        job = TrainJob(
            str(self.package.folder),
            self.package.sha256,
            str(self.prepared),
            str(self.state),
            str(data),
            str(change),
            task,
            CAP_BYTES,
            self.threads,
        )
        outcome = train(job, Meter())
        specs = [self.package.manifest.slice_named(name) for name in (*task.slices, "head")]
        return outcome.examples, decode_values(change.read_bytes(), specs)

    def by_backpropagation(self, reference: TorchReference) -> LocalTraining:
        """Local training with the exact gradient of the same slices on the same batches."""
        manifest = self.package.manifest
        tokenizer = Tokenizer(self.package.path(manifest.tokenizer), self.config.sequence_limit)

        def local(task: Task, values: Values, data: Path) -> tuple[int, Values]:
            rows = load_rows(data, manifest.labels)
            ids = tokenizer.encode(rows)
            specs = [manifest.slice_named(name) for name in (*task.slices, "head")]
            optimizer = make_optimizer(task.optimizer, values, list(shapes(specs)))
            batches = draw_batches(
                len(rows),
                seed=task.seed,
                round_number=task.round,
                slot=task.slot,
                steps=task.steps,
                batch_size=task.batch_size,
            )
            for chosen in batches:
                batch = make_batch(
                    [ids[i] for i in chosen],
                    [rows[i].label for i in chosen],
                    pad_token_id=manifest.pad_token_id,
                )
                outputs, gradient = slice_gradient(reference, batch, optimizer.values(), task.slices)
                head = head_gradient(
                    outputs["residual"].detach().numpy(), outputs["features"].detach().numpy()
                )
                optimizer.step({**gradient, **head})
            return sum(len(chosen) for chosen in batches), optimizer.delta()

        return local

    def _task(self, number: int, slot: int, slices: tuple[str, ...]) -> Task:
        config = self.config
        return Task(
            task_id=f"{number}-{slot}",
            run_id="reference",
            round=number,
            slot=slot,
            seed=config.seed,
            package=self.package.sha256,
            package_signature="A" * 86 + "==",
            state="0" * 64,
            slices=slices,
            train_head=True,
            steps=config.steps,
            batch_size=config.batch_size,
            draws=config.draws,
            sequence_limit=config.sequence_limit,
            optimizer=config.local_optimizer,
            required_bytes=0,
            deadline_s=0,
            directions=config.directions,
        )


def main() -> int:
    """Run the chosen arms for each seed; the result file is written after each seed, and complete each time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2", help="run seeds; the demo's is 0")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=TOML", help="override run.toml")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--arithmetic", choices=ARITHMETICS, help="of devices and evaluation; default: the best here"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    table = tomllib.loads((HERE / "run.toml").read_text())
    for override in arguments.set:
        _override(table, override)
    config = run_config({**table, "package": "package", "publisher_key": generate_key().public_key})
    with tempfile.TemporaryDirectory() as temporary:
        simulation = Simulation(Path(temporary), config, arguments.threads, arguments.arithmetic)
        loaded = load_model(simulation.model, len(simulation.labels), simulation.slice_options)
        stored = store(loaded, "int8")
        backpropagation = simulation.by_backpropagation(TorchReference(stored.segments, stored.in_memory()))
        seeds: dict[str, dict[str, Any]] = {}
        for seed in arguments.seeds.split(","):
            simulation.config = msgspec.structs.replace(config, seed=int(seed))
            seeds[seed] = {}
            for arm in arguments.arms.split(","):
                slices = () if arm == "head_only" else simulation.slices
                local = backpropagation if arm == "backpropagation" else simulation.by_the_worker
                seeds[seed][arm] = simulation.run(f"seed {seed} {arm}", slices, local)
            _store(arguments.output, table, seeds)
    return 0


def _store(path: Path, table: dict[str, Any], seeds: dict[str, dict[str, Any]]) -> None:
    revision = ["git", "rev-parse", "HEAD"]
    document = {
        "command": "make demo-reference",
        "commit": subprocess.run(revision, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "torch", "transformers")},
        "config": msgspec.to_builtins(table),
        "seeds": seeds,
        "rows": _rows(seeds),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def _rows(seeds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, each with its range; the value to reach is the demo's own."""
    rows = []
    for arm in ARMS:
        found = [100 * arms[arm]["accuracy"] for arms in seeds.values() if arm in arms]
        if found:
            spread = f"{len(found)} seeds, {min(found):.1f} to {max(found):.1f}"
            forward = arm == "forward"
            rows.append(
                {
                    "name": f"dev accuracy, {arm.replace('_', ' ')} ({spread})",
                    "value": round(sum(found) / len(found), 2),
                    "unit": "%",
                    "reach": 75 if forward else None,
                    "met": min(found) >= 75 if forward else None,
                }
            )
    complete = [arms for arms in seeds.values() if all(arm in arms for arm in ARMS)]
    if complete:
        mean = {arm: sum(arms[arm]["accuracy"] for arms in complete) / len(complete) for arm in ARMS}
        gain = mean["backpropagation"] - mean["head_only"]
        rows.append(_row("backpropagation's gain over head only", 100 * gain, "points"))
        if gain > 0:
            kept = (mean["forward"] - mean["head_only"]) / gain
            rows.append(_row("of that gain, kept by forward mode (ratio of the means)", 100 * kept, "%"))
    return rows


def _row(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": round(value, 2), "unit": unit, "reach": None, "met": None}


def _override(table: dict[str, Any], override: str) -> None:
    path, _, value = override.partition("=")
    *parents, last = path.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    table[last] = tomllib.loads(f"value = {value}")["value"]


if __name__ == "__main__":
    sys.exit(main())
