"""The loss along the server's last step: slope and curvature, on a device and on their way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import save

from edge_runtime.errors import SliceError
from edge_runtime.package.slices import Values
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.training.line import LINE, along_line, without_line
from edge_runtime.training.methods import measures_line
from tests.edge_runtime.local import train
from tests.export import tiny


def test_curvature_of_two_classes_is_the_softmax_one() -> None:
    """With two classes, losses and derivatives alone give the Gauss-Newton curvature; with more, a part of it."""
    random = np.random.default_rng(2)
    for classes, exact in ((2, True), (5, False)):
        logits, moved = random.standard_normal((2, 64, classes))
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        losses, jvps = -np.log(shares[:, 0]), (shares * moved).sum(axis=1) - moved[:, 0]
        whole = ((shares * moved**2).sum(axis=1) - (shares * moved).sum(axis=1) ** 2).mean()
        slope, curvature = along_line(jvps.astype(np.float32), losses.astype(np.float32))
        assert slope == pytest.approx(jvps.mean(), rel=1e-5)
        if exact:
            assert curvature == pytest.approx(whole, rel=1e-5)
        else:
            assert 0 < curvature < whole


def test_a_loss_of_zero_has_no_infinite_curvature() -> None:
    """An example that is all but certain adds next to nothing, though its weight grows without bound."""
    assert along_line(np.float32([0.0, 1e-9]), np.float32([0.0, 1e-9])) == (
        pytest.approx(5e-10),
        pytest.approx(0),
    )


def test_a_task_measures_along_its_reference(float_prepared, exported) -> None:
    """The slope is the exact gradient times the line; the change is the same as without one, to the last bit."""
    values = tiny.flat(tiny.moved_slices(exported.reference))
    random = np.random.default_rng(3)
    line = {name: random.standard_normal(value.shape).astype(np.float32) for name, value in values.items()}
    task = tiny.make_task(
        float_prepared.package, steps=1, batch_size=8, draws=2, directions="dealt", optimizer=LocalOptimizer()
    )
    asked = replace(task, reference="1" * 64)
    change = train(float_prepared, asked, values, reference=line).delta
    slope, curvature = change.pop(LINE)
    plain = train(float_prepared, task, values).delta
    assert plain.keys() == change.keys()
    assert all(np.array_equal(plain[name], change[name]) for name in plain)
    exact = train(
        float_prepared, replace(task, update="backprop", draws=1, directions="per_example"), values
    ).delta
    trained = [name for name in exact if not name.startswith("head/")]
    rate = LocalOptimizer().slice_rate
    expected = -sum(float((exact[name] * line[name]).sum()) for name in trained) / rate
    assert slope == pytest.approx(expected, rel=1e-3)
    assert curvature > 0


@dataclass(frozen=True)
class Asked:
    """A task's settings, and whether it measures."""

    changes: dict[str, object]
    measures: bool


ASKED = {
    "forward": Asked({}, True),
    "no reference": Asked({"reference": None}, False),
    "no slice": Asked({"slices": ()}, False),
    "filtered": Asked({"directions": "filtered"}, False),
    "exact": Asked({"update": "backprop", "draws": 1}, False),
    "sums": Asked({"head": "closed_form"}, False),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_which_tasks_measure(exported, asked: Asked) -> None:
    """Forward mode on slices does, where the task names the server's last step."""
    task = tiny.make_task(exported.package, **{"reference": "1" * 64, **asked.changes})
    assert measures_line(task) == asked.measures


def test_on_its_way() -> None:
    """A change is the same bytes with slope and curvature taken off, and without any."""
    change: Values = {"a/core": np.ones((1, 2, 2), np.float32)}
    assert without_line(save(change)) == (save(change), None)
    assert without_line(save({**change, LINE: np.float32([-1, 4])})) == (save(change), (-1.0, 4.0))


@pytest.mark.parametrize(
    "line",
    [np.float32([1]), np.float64([1, 1]), np.float32([np.inf, 1]), np.float32([1, -1])],
    ids=["one number", "double", "not finite", "below zero"],
)
def test_what_makes_no_sense_is_refused(line: np.ndarray) -> None:
    """Anything but two finite float32 numbers, the second not below zero, is refused by name."""
    with pytest.raises(SliceError, match=LINE):
        without_line(save({LINE: line}))


def test_bytes_that_are_no_file_are_refused() -> None:
    """Random bytes are told apart from a change."""
    with pytest.raises(SliceError, match="not a safetensors file"):
        without_line(b"nonsense")
