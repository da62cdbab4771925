"""What one machine computes of a package: ``python -m tests.installed.figures PACKAGE KEY VALUES OUTPUT``.

It needs what a device has and no more, so that it runs on a device for arm64 and on this machine alike.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
from safetensors.numpy import load_file, save_file

from edge_runtime.data.batches import Row, Tokenizer, make_batch
from edge_runtime.data.examples import Examples
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.prepare import prepare
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values
from edge_runtime.protocol.messages import Directions, LocalOptimizer, Task
from edge_runtime.training.estimators import executor_of
from edge_runtime.training.loop import train_locally
from edge_runtime.training.replay import replay
from edge_runtime.training.step import LocalWork
from edge_runtime.training.tangents import draw_tangents

TEXTS = (
    "the film is a quiet joy from start to finish",
    "a dull plot and worse acting",
    "i would gladly watch it again",
    "nothing in it works",
)
#: Directions that need neither a reference nor a run's history.
KINDS = tuple(kind for kind in get_args(Directions) if kind != "filtered")


def task_on(package: Package, directions: Directions = "per_example") -> Task:
    """A short task on all slices, whose report is scalars."""
    return Task(
        task_id="t-1",
        run_id="r-1",
        round=1,
        slot=0,
        seed=11,
        package=package.sha256,
        package_signature="A" * 86 + "==",
        state="0" * 64,
        slices=tuple(spec.name for spec in package.manifest.slices if spec.kind != "head"),
        train_head=True,
        steps=2,
        batch_size=len(TEXTS),
        draws=2,
        sequence_limit=32,
        optimizer=LocalOptimizer("adamw", 0.01, 0.01),
        required_bytes=0,
        deadline_s=600.0,
        report="scalars",
        directions=directions,
    )


def figures(package: Package, values: Values, work: Path) -> dict[str, np.ndarray]:
    """Tangents of every kind; and for each arithmetic losses, jvps, a training's scalars, and the change they make."""
    found: dict[str, np.ndarray] = {}
    slices = [spec for spec in package.manifest.slices if spec.kind != "head"]
    for kind in KINDS:
        for name, tangents in draw_tangents(task_on(package, kind), slices, 1, range(len(TEXTS))).items():
            found[f"tangents/{kind}/{name}"] = tangents
    for arithmetic in package.manifest.arithmetics:
        prepared = prepare(package, work / arithmetic, OnnxEngine(), arithmetic)
        for name, array in _trained(prepared, values).items():
            found[f"{arithmetic}/{name}"] = array
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _trained(prepared: PreparedPackage, values: Values) -> dict[str, np.ndarray]:
    package, task = prepared.package, task_on(prepared.package)
    manifest = prepared.manifest
    ids = Tokenizer(package.path(manifest.tokenizer), 32).encode([Row(text) for text in TEXTS])
    labels = [row % len(manifest.labels) for row in range(len(TEXTS))]
    batch = make_batch(ids, labels, pad_token_id=manifest.pad_token_id)
    slices = [spec for spec in manifest.slices if spec.kind != "head"]
    tangents = draw_tangents(task, slices, 0, range(len(TEXTS)))
    choice = ExecutionChoice("resident", task.batch_size, task.draws)
    examples = Examples(ids, labels, manifest.pad_token_id, 32)
    work = LocalWork(executor_of(task, prepared, OnnxEngine(), choice, None), task, examples, choice, None)
    sweep = work.executor.sweep(values, [batch], [tangents])
    report = train_locally(work, values).delta
    in_weights = msgspec.structs.replace(task, report="weights")
    change = train_locally(
        LocalWork(
            executor_of(in_weights, prepared, OnnxEngine(), choice, None), in_weights, examples, choice, None
        ),
        values,
    ).delta
    made_again = replay(task, slices, values, report)
    primal = [prepared.variant(manifest.programs[segment.primal]) for segment in manifest.segments]
    return {
        "loss": sweep.loss,
        "jvps": sweep.jvps,
        "limit": np.array([prepared.prepared.weight_limit]),
        "signed": np.array([all(v.file == v.signed for v in primal if v.signed)]),
        **{f"report/{name}": array for name, array in report.items()},
        **{f"change/{name}": array for name, array in change.items() if name in made_again},
        **{f"replay/{name}": array for name, array in made_again.items()},
    }


def replayed(package: Package, values: Values, found: Mapping[str, np.ndarray], arithmetic: str) -> Values:
    """The change that another machine's report makes on this one."""
    report = {
        name.removeprefix(f"{arithmetic}/report/"): array
        for name, array in found.items()
        if name.startswith(f"{arithmetic}/report/")
    }
    slices = [spec for spec in package.manifest.slices if spec.kind != "head"]
    return replay(task_on(package), slices, values, report)


def main() -> None:
    """Compute and write them."""
    folder, key, values, output = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        found = figures(Package.open(Path(folder), key), load_file(values), Path(work))
    save_file(found, output)
    print(hashlib.sha256(Path(output).read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
