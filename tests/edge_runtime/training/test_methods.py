"""Impossible combinations: each is refused in one line, by device and by configuration alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edge_runtime.errors import ConfigError, EdgeError, PackageError
from edge_runtime.protocol.messages import Task
from edge_runtime.training.methods import check_method, check_task
from edge_runtime.worker.jobs import TrainOutcome
from edge_runtime.worker.process import run_worker
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.packages import make_manifest
from tests.edge_runtime.worker.test_main import data, train_job, values  # noqa: F401 - fixtures

METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "draws of backpropagation": (
        {"update": "backprop", "draws": 2},
        "makes no draws, so draws = 2 must be 1",
    ),
    "a head that backpropagation perturbs": (
        {"update": "backprop", "draws": 1, "head": "perturbed"},
        'head = "perturbed" must be "exact"',
    ),
    "nothing to replay": (
        {"update": "backprop", "draws": 1, "report": "scalars"},
        'report = "scalars" must be "weights"',
    ),
    "nothing to limit": (
        {"update": "backprop", "draws": 1, "jvp_limit": 2.0},
        "leave out jvp_limit = 2.0",
    ),
    "a best that may perturb the head": (
        {"update": "best", "head": "perturbed"},
        'head = "perturbed" must be "exact"',
    ),
    "a best that may have nothing to replay": (
        {"update": "best", "report": "scalars"},
        'report = "scalars" must be "weights"',
    ),
    "a best with clamped derivatives": (
        {"update": "best", "jvp_limit": 2.0},
        "clamped ones have another mean: leave out jvp_limit = 2.0",
    ),
    "a best with biased directions": (
        {"update": "best", "directions": "filtered"},
        'directions = "filtered" have another mean; take "one_slice" or "dealt"',
    ),
    "zero order of each example": ({"update": "zero_order"}, "batches of one; take"),
    "zero order along dealt directions": (
        {"update": "zero_order", "directions": "dealt"},
        'directions = "dealt" would need batches of one; take',
    ),
    "candidates without a filter": (
        {"candidates": 10, "directions": "gaussian"},
        'candidates = 10 belongs to directions = "filtered", not to "gaussian"',
    ),
}
GOOD: list[dict[str, Any]] = [
    {},
    {"update": "backprop", "draws": 1},
    {"update": "best", "draws": 16, "directions": "dealt"},
    {"report": "scalars", "directions": "dealt"},
    {"report": "scalars", "head": "perturbed", "jvp_limit": 1.0},
    {"update": "zero_order", "directions": "gaussian", "report": "scalars"},
    {"update": "zero_order", "directions": "filtered", "candidates": 10},
]
PACKAGES: dict[str, tuple[dict[str, Any], dict[str, Any], type[EdgeError], str]] = {
    "no head": ({"train_head": True}, {"slices": ()}, PackageError, "no head to train.*train_head = false"),
    "tokens": ({"loss": "phuber"}, {"task": "causal_lm"}, ConfigError, "makes one a token"),
    "no A": ({"freeze_a": True}, {}, ConfigError, "lora_xs, which have none"),
    "no slice": ({"slices": ("elsewhere",)}, {}, PackageError, "elsewhere"),
}


@pytest.mark.parametrize(("changed", "message"), METHODS.values(), ids=METHODS.keys())
def test_what_does_not_go_together_is_refused(changed: dict[str, Any], message: str) -> None:
    """Both settings are named, in one line."""
    with pytest.raises(ConfigError, match=message) as caught:
        check_method(replace(TASK, **changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed", GOOD)
def test_what_goes_together_passes(changed: dict[str, Any]) -> None:
    """Published methods, and combinations of our own, are let through."""
    check_method(replace(TASK, **changed))


@pytest.mark.parametrize(("asked", "package", "error", "message"), PACKAGES.values(), ids=PACKAGES.keys())
def test_what_a_package_cannot_do_is_refused(
    asked: dict[str, Any], package: dict[str, Any], error: type[EdgeError], message: str
) -> None:
    """A task that its package cannot serve is refused with the package's name."""
    manifest = make_manifest()
    task: Task = replace(TASK, slices=("block0.query",) if "slices" not in package else ())
    check_task(task, manifest)
    with pytest.raises(error, match=message):
        check_task(replace(task, **asked), replace(manifest, **package))


def test_a_worker_refuses_before_it_loads(train_job) -> None:  # noqa: F811
    """A task that does not go together ends in the same error, and nothing is written."""
    job = train_job(update="zero_order")
    with pytest.raises(ConfigError, match="batches of one"):
        run_worker(job, TrainOutcome)
    assert not Path(job.delta_path).exists()


def test_a_worker_refuses_what_its_package_cannot_do(train_job) -> None:  # noqa: F811
    """LoRA-XS slices have no A to freeze."""
    with pytest.raises(ConfigError, match="lora_xs"):
        run_worker(train_job(freeze_a=True), TrainOutcome)
