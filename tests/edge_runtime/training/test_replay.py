"""Reports of scalars: what is replayed from them is what the device did, bit for bit; what cannot be is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import save

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import SliceError
from edge_runtime.execution.prepare import prepare
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.slices import Values, encode_values
from edge_runtime.protocol.messages import PER_EXAMPLE, LocalOptimizer, Task
from edge_runtime.training.replay import SCALARS, STEPS, decode_report
from edge_runtime.training.replay import replay as replay_report
from edge_runtime.training.trainable import exact_heads
from tests.edge_runtime.local import both_reports, train
from tests.export import tiny

#: Ways to make the same estimate: settings of the task, and how the work is done.
METHODS: dict[str, dict[str, Any]] = {
    "per example": {},
    "shared": {"directions": "shared"},
    "one slice": {"directions": "one_slice", "draws": 5},
    "dealt": {"directions": "dealt", "draws": 5},
    "perturbed head, dealt": {"head": "perturbed", "directions": "dealt"},
    "orthogonal": {"directions": "orthogonal", "draws": 5},
    "gaussian": {"directions": "gaussian"},
    "perturbed head": {"head": "perturbed"},
    "perturbed head, orthogonal": {"head": "perturbed", "directions": "orthogonal"},
    "perturbed head alone": {"head": "perturbed", "slices": ()},
    "no head": {"train_head": False},
    "head alone": {"slices": ()},
    "zero order": {"update": "zero_order", "directions": "gaussian"},
    "zero order, forward": {"update": "zero_order", "directions": "shared", "difference": "forward"},
    "zero order, perturbed head": {"update": "zero_order", "directions": "orthogonal", "head": "perturbed"},
    "limited": {"jvp_limit": 0.05},
    "huberised": {"loss": "phuber", "phuber_tau": 2.0},
    "epochs": {"epochs": 1},
}


@pytest.fixture(scope="module")
def values(exported) -> Values:
    """Slice and head values away from zero."""
    return tiny.flat(tiny.moved_slices(exported.reference))


def replayed(prepared, task: Task, values: Values, report: Values) -> bytes:
    """The bytes of the weights report, made from a scalars report that travelled."""
    specs = prepared.manifest.slices
    arrived = decode_report(encode_values(report), task, specs)
    heads = {name: arrived[name] for name in arrived if name.startswith("head/")}
    return encode_values({**replay_report(task, specs, values, arrived), **heads})


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("optimizer", ["accumulate", "sgd", "adamw"])
def test_a_replay_gives_the_devices_own_bytes(float_prepared, values, method: dict, optimizer: Any) -> None:
    """From task, values and scalars alone come the very bytes of the weights report, uneven micro-batches or not."""
    settings = {"draws": 3, "steps": 3, "batch_size": 4, **method}
    task = tiny.make_task(float_prepared.package, optimizer=LocalOptimizer(optimizer, 0.02, 0.01), **settings)
    choice = ExecutionChoice("resident", 3, 2)  # groups of 3 and 1 examples
    weights, scalars = both_reports(float_prepared, task, values, choice=choice)
    assert weights.steps_applied == (2 if task.epochs else 3)
    assert replayed(float_prepared, task, values, scalars.delta) == encode_values(weights.delta)
    estimates = bool(task.slices) or task.head == "perturbed"
    assert any(array.any() for array in weights.delta.values())
    assert (SCALARS in scalars.delta) == estimates
    sent = {name for name in scalars.delta if not name.startswith("scalars/")}
    assert sent == (
        {"head/weight", "head/bias"} if exact_heads(task, float_prepared.manifest.slices) else set()
    )
    if estimates:
        examples = 4 if task.directions in PER_EXAMPLE else 1
        assert scalars.delta[SCALARS].shape == (weights.steps_applied, task.draws, examples)


@pytest.mark.parametrize("directions", ["one_slice", "gaussian"])
def test_compressed_moments_are_replayed_to_the_same_bytes(float_prepared, values, directions: Any) -> None:
    """Matching pursuit takes the same way on either side, so SGC's steps come from scalars alone."""
    sketch = {"sketch_size": 14, "sketch_entries": 2, "draws": 3, "steps": 3, "batch_size": 4}
    task = tiny.make_task(
        float_prepared.package, optimizer=LocalOptimizer("sgc", 0.02, 0.01), directions=directions, **sketch
    )
    weights, scalars = both_reports(float_prepared, task, values)
    assert replayed(float_prepared, task, values, scalars.delta) == encode_values(weights.delta)
    assert all(2 <= np.count_nonzero(weights.delta[f"{name}/core"]) <= 6 for name in task.slices)


def test_rows_are_replayed_and_follow_the_exact_gradient(exported_rows, tmp_path) -> None:
    """Of a slice of rows these alone move, by the same bytes from scalars, and along the exact gradient."""
    prepared = prepare(exported_rows.package, tmp_path / "it", OnnxEngine(), "float")
    values = tiny.flat(tiny.moved_slices(exported_rows.reference))
    settings = {
        "steps": 1,
        "batch_size": 4,
        "optimizer": LocalOptimizer("sgd", 0.1, 0.1),
        "train_head": False,
    }
    task = tiny.make_task(prepared.package, directions="orthogonal", draws=512, **settings)
    weights, scalars = both_reports(prepared, task, values)
    assert set(weights.delta) == {f"{name}/rows" for name in task.slices}
    assert replayed(prepared, task, values, scalars.delta) == encode_values(weights.delta)
    exact = train(prepared, replace(task, update="backprop", draws=1, directions="shared"), values).delta
    for name, change in weights.delta.items():
        assert change.any()
        np.testing.assert_allclose(exact[name], change, atol=1e-3 * float(np.abs(change).max()))


@pytest.mark.parametrize("update", ["forward", "zero_order"])
def test_a_skipped_step_is_replayed_as_skipped(float_prepared, values, update: Any) -> None:
    """Steps whose loss is not finite are missing from the report, and later steps keep their own directions."""
    values = {**values, "head/bias": np.array([3e38, -3e38, 0], dtype=np.float32)}
    task = tiny.make_task(
        float_prepared.package, steps=8, batch_size=1, update=update, directions="shared", train_head=False
    )
    weights, scalars = both_reports(float_prepared, task, values)
    steps = scalars.delta[STEPS].tolist()
    assert weights.steps_skipped == 3
    assert len(steps) == 5
    assert steps != list(range(5))
    assert replayed(float_prepared, task, values, scalars.delta) == encode_values(weights.delta)


def test_without_an_applied_step_nothing_moves(float_prepared, values) -> None:
    """A report without scalars replays to zeros."""
    values = {**values, "head/bias": np.full(3, np.inf, np.float32)}
    task = tiny.make_task(float_prepared.package, report="scalars", train_head=False)
    trained = train(float_prepared, task, values)
    assert (trained.steps_applied, trained.delta) == (0, {})
    delta = replay_report(task, float_prepared.manifest.slices, values, trained.delta)
    assert set(delta) == {f"{name}/core" for name in task.slices}
    assert not any(array.any() for array in delta.values())


def test_the_order_in_which_slices_are_handed_over_does_not_matter(float_prepared, values) -> None:
    """Directions follow the order of the task, whatever the order of the specifications."""
    task = tiny.make_task(float_prepared.package, report="scalars", directions="orthogonal", head="perturbed")
    report = train(float_prepared, task, values).delta
    specs = float_prepared.manifest.slices
    forwards, backwards = (replay_report(task, order, values, report) for order in (specs, specs[::-1]))
    assert encode_values(forwards) == encode_values(backwards)


SHAPE = (2, 2, 4)
GOOD = {SCALARS: np.ones(SHAPE, np.float32), STEPS: np.array([0, 1], np.float32)}
HEAD = {"head/weight": np.zeros((3, 64), np.float32), "head/bias": np.zeros(3, np.float32)}
BAD: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    "unknown tensor": ({"other": np.zeros(1, np.float32)}, "unknown tensor other"),
    "a slice's change": ({"encoder.layer.1.attention.self.query/core": np.zeros(1, np.float32)}, "unknown"),
    "no head": ({"head/bias": None}, "head/bias is missing"),
    "a head of another shape": ({"head/bias": np.zeros(4, np.float32)}, r"head/bias has shape \(4,\)"),
    "float64": ({SCALARS: np.ones(SHAPE)}, "must be finite float32"),
    "not finite": ({SCALARS: np.full(SHAPE, np.nan, np.float32)}, "must be finite float32"),
    "steps alone": ({SCALARS: None}, "or neither"),
    "scalars alone": ({STEPS: None}, "or neither"),
    "flat scalars": ({SCALARS: np.ones((2, 2), np.float32)}, r"expected \(steps, 2, 1 to 4\)"),
    "other draws": ({SCALARS: np.ones((2, 3, 4), np.float32)}, r"expected \(steps, 2, 1 to 4\)"),
    "more examples": ({SCALARS: np.ones((2, 2, 5), np.float32)}, r"expected \(steps, 2, 1 to 4\)"),
    "no examples": ({SCALARS: np.ones((2, 2, 0), np.float32)}, r"expected \(steps, 2, 1 to 4\)"),
    "more steps": (
        {SCALARS: np.ones((3, 2, 4), np.float32), STEPS: np.arange(3, dtype=np.float32)},
        "one ascending step number",
    ),
    "a step too few": ({STEPS: np.zeros(1, np.float32)}, "one ascending step number"),
    "a step twice": ({STEPS: np.ones(2, np.float32)}, "one ascending step number"),
    "backwards": ({STEPS: np.array([1, 0], np.float32)}, "one ascending step number"),
    "half a step": ({STEPS: np.array([0, 0.5], np.float32)}, "one ascending step number"),
    "a step beyond": ({STEPS: np.array([0, 2], np.float32)}, "a step outside 0 to 1"),
    "a step before": ({STEPS: np.array([-1, 0], np.float32)}, "a step outside 0 to 1"),
    "over the limit": ({SCALARS: np.full(SHAPE, 3.0, np.float32)}, "beyond the task's jvp_limit of 2.0"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_the_task_is_refused(exported, changed: dict, message: str) -> None:
    """Each report that the task does not allow is a SliceError that names tensor and limit."""
    task = tiny.make_task(exported.package, report="scalars", jvp_limit=2.0)
    heads = [exported.package.manifest.head]
    good = {**GOOD, **HEAD}
    assert set(decode_report(save(good), task, heads)) == set(good)
    report = {name: array for name, array in {**good, **changed}.items() if array is not None}
    with pytest.raises(SliceError, match=message):
        decode_report(save(report), task, heads)


def test_a_task_that_estimates_nothing_sends_no_scalars(exported) -> None:
    """Where the head alone is trained, exactly, scalars are unknown tensors."""
    task = tiny.make_task(exported.package, slices=())
    heads = [exported.package.manifest.head]
    assert set(decode_report(save(HEAD), task, heads)) == set(HEAD)
    with pytest.raises(SliceError, match="unknown tensor scalars/jvps"):
        decode_report(save({**GOOD, **HEAD}), task, heads)


@pytest.mark.parametrize("optimizer", ["accumulate", "sgd", "adamw"])
def test_numbers_that_overflow_are_refused(exported, values, optimizer: Any) -> None:
    """Finite numbers whose change is not are a SliceError that names the tensor, and no warning."""
    task = tiny.make_task(exported.package, train_head=False, optimizer=LocalOptimizer(optimizer, 1e3))
    huge = {SCALARS: np.full(SHAPE, 3e38, np.float32), STEPS: GOOD[STEPS]}
    report = decode_report(save(huge), task, [])
    with pytest.raises(SliceError, match=r"encoder.layer.*core .*not finite"):
        replay_report(task, exported.package.manifest.slices, values, report)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xff" * 64])
def test_bytes_that_are_no_safetensors_are_refused(exported, data: bytes) -> None:
    """Whatever arrives ends in a SliceError."""
    with pytest.raises(SliceError, match="not a safetensors file"):
        decode_report(data, tiny.make_task(exported.package), [])


def test_one_number_a_draw_where_examples_share_directions(exported) -> None:
    """A report of shared directions has one column."""
    task = replace(tiny.make_task(exported.package, train_head=False), directions="gaussian")
    with pytest.raises(SliceError, match=r"expected \(steps, 2, 1 to 1\)"):
        decode_report(save(GOOD), task, [])


def test_a_perturbed_head_sends_nothing_else(exported) -> None:
    """With a head that is perturbed like a slice, its tensors in a report are unknown."""
    task = tiny.make_task(exported.package, head="perturbed")
    heads = [exported.package.manifest.head]
    assert set(decode_report(save(GOOD), task, heads)) == set(GOOD)
    with pytest.raises(SliceError, match="unknown tensor head/bias"):
        decode_report(save({**GOOD, **HEAD}), task, heads)
