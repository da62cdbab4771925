"""Filtered directions: which candidates are kept, that every machine keeps the same, and what they cost."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import save

from edge_runtime.errors import SliceError
from edge_runtime.package.slices import Values, encode_values
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.training.filtered_directions import decode_reference, draw_filtered
from edge_runtime.training.replay import SCALARS, decode_report
from edge_runtime.training.replay import replay as replay_report
from edge_runtime.training.tangents import GRAIN, NORMALS, draw_flat, draw_tangents
from tests.edge_runtime.golden.tangents import SPECS, STEP, TASK
from tests.edge_runtime.local import both_reports, train
from tests.export import tiny

DRAWS, CANDIDATES = 3, 8
FILTERED = replace(TASK, directions="filtered", draws=DRAWS, candidates=CANDIDATES)
SHAPES = {"block0.query/core": (1, 4, 4), "block1.value/A": (1, 3, 20), "block1.value/B": (1, 7, 3)}


@pytest.fixture
def reference() -> Values:
    """Some change of all tensors."""
    generator = np.random.default_rng(4)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def candidates() -> dict[str, np.ndarray]:
    """All candidates of a step, by tensor: normal draws of the same task."""
    task = replace(TASK, directions="gaussian", draws=DRAWS * CANDIDATES)
    return {name: tangent[:, 0] for name, tangent in draw_tangents(task, SPECS, STEP, [0]).items()}


def cosine(candidate: np.ndarray, reference: np.ndarray) -> float:
    """In float64, by the definition."""
    a, b = candidate.ravel().astype(float), reference.ravel().astype(float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_nearest_candidates_of_each_tensor_are_kept(reference) -> None:
    """Per tensor, of 24 candidates the three with the largest cosine, the nearest first; the batch shares them."""
    got = draw_tangents(FILTERED, SPECS, STEP, range(2), reference)
    for name, drawn in candidates().items():
        order = np.argsort([-cosine(each, reference[name]) for each in drawn])[:DRAWS]
        assert np.array_equal(got[name][:, 0], drawn[order])
        assert np.array_equal(got[name][:, 1], drawn[order])


def test_without_a_reference_the_first_candidates_are_taken(reference) -> None:
    """In a first round, and for a tensor that did not move, directions are those of ``gaussian``."""
    plain = draw_tangents(replace(FILTERED, directions="gaussian", candidates=1), SPECS, STEP, [0])
    first = draw_tangents(FILTERED, SPECS, STEP, [0])
    assert all(np.array_equal(first[name], plain[name]) for name in plain)
    still = {**reference, "block1.value/B": np.zeros((1, 7, 3), np.float32)}
    got = draw_tangents(FILTERED, SPECS, STEP, [0], still)
    assert np.array_equal(got["block1.value/B"], plain["block1.value/B"])
    assert not np.array_equal(got["block1.value/A"], plain["block1.value/A"])


def test_the_choice_is_that_of_exact_arithmetic(reference) -> None:
    """Ranked in integers and fractions, without a rounding anywhere, the same candidates come out."""
    got = draw_tangents(FILTERED, SPECS, STEP, [0], reference)
    for name, drawn in candidates().items():
        whole = [[int(v / GRAIN) for v in each.ravel()] for each in drawn]
        largest = float(np.abs(reference[name]).max())
        levels = [round(float(v) / largest * 2**20) for v in reference[name].ravel()]
        ranked = []
        for number, each in enumerate(whole):
            product = sum(a * b for a, b in zip(each, levels, strict=True))
            square = sum(a * a for a in each)
            ranked.append((-Fraction(product * 10**30, isqrt(square * 10**60)), number))
        order = [number for _, number in sorted(ranked)][:DRAWS]
        assert np.array_equal(got[name][:, 0], drawn[order])


def test_the_larger_the_pool_the_nearer_the_directions(reference) -> None:
    """Over many steps the mean cosine of what is kept grows with the number of candidates, from about zero."""
    means = []
    for count in (1, 4, 16):
        task = replace(FILTERED, candidates=count)
        drawn = [draw_tangents(task, SPECS, step, [0], reference)["block1.value/A"] for step in range(30)]
        means.append(np.mean([cosine(v, reference["block1.value/A"]) for each in drawn for v in each[:, 0]]))
    assert abs(means[0]) < 0.05
    assert means[1] > means[0] + 0.05
    assert means[2] > means[1] + 0.05


def test_candidates_are_looked_at_one_at_a_time(reference) -> None:
    """Each is drawn once to be judged, the kept ones once more; what is held are K directions and one candidate."""
    asked: list[int] = []

    def candidate(number: int) -> np.ndarray:
        asked.append(number)
        return draw_flat(TASK, SPECS, STEP, [0], [number], NORMALS)[0, 0]

    draw_filtered(candidate, SPECS, DRAWS, CANDIDATES, reference, GRAIN)
    total = DRAWS * CANDIDATES
    assert asked[:total] == list(range(total))
    assert len(set(asked[total:])) == len(asked[total:]) <= DRAWS * len(SHAPES)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("block1.value/B", None, "lacks tensor block1.value/B"),
        ("block1.value/B", np.zeros((1, 3, 7), np.float32), r"block1.value/B .* has shape \(1, 3, 7\)"),
        ("block1.value/B", np.zeros((1, 7, 3)), "must be finite float32"),
        ("block1.value/B", np.full((1, 7, 3), np.inf, np.float32), "must be finite float32"),
    ],
    ids=["missing", "shape", "dtype", "infinite"],
)
def test_a_reference_that_does_not_fit_is_refused(reference, name: str, array: Any, message: str) -> None:
    """Each is a SliceError that names the tensor; tensors that are not asked for are left out."""
    good = decode_reference(save({**reference, "head/bias": np.zeros(2, np.float32)}), SPECS)
    assert set(good) == set(SHAPES)
    changed = {k: v for k, v in {**reference, name: array}.items() if v is not None}
    with pytest.raises(SliceError, match=message):
        decode_reference(save(changed), SPECS)
    if "float32" not in message:
        with pytest.raises(SliceError, match=message):
            draw_tangents(FILTERED, SPECS, STEP, [0], changed)


def test_bytes_that_are_no_reference_are_refused() -> None:
    """What is not safetensors is a SliceError."""
    with pytest.raises(SliceError, match="not a safetensors file"):
        decode_reference(b"nonsense", SPECS)


@pytest.fixture(scope="module")
def values(exported) -> Values:
    """Slice and head values away from zero."""
    return tiny.flat(tiny.moved_slices(exported.reference))


@pytest.mark.parametrize("update", ["forward", "zero_order"])
@pytest.mark.parametrize("optimizer", ["accumulate", "sgd", "adamw"])
def test_a_replay_keeps_the_same_candidates(float_prepared, values, update: Any, optimizer: Any) -> None:
    """With task, reference and scalars the device's change is made again, bit for bit."""
    task = tiny.make_task(
        float_prepared.package,
        directions="filtered",
        candidates=5,
        update=update,
        head="perturbed",
        optimizer=LocalOptimizer(optimizer, 0.02, 0.01),
    )
    generator = np.random.default_rng(3)
    last = {name: generator.normal(size=value.shape).astype(np.float32) for name, value in values.items()}
    weights, scalars = both_reports(float_prepared, task, values, reference=last)
    specs = float_prepared.manifest.slices
    report = decode_report(encode_values(scalars.delta), task, specs)
    made = replay_report(task, specs, values, report, last)
    assert encode_values(made) == encode_values(weights.delta)
    assert encode_values(replay_report(task, specs, values, report)) != encode_values(weights.delta)


def test_directions_near_the_gradient_have_larger_derivatives(float_prepared, values) -> None:
    """Filtered by the exact change, numbers are larger than those of as many plain normal directions."""
    task = tiny.make_task(float_prepared.package, steps=1, batch_size=8, draws=4, report="scalars")
    exact = train(
        float_prepared,
        replace(task, update="backprop", report="weights", draws=1, optimizer=LocalOptimizer()),
        values,
    )
    filtered = replace(task, directions="filtered", candidates=10)
    near, plain = (
        train(float_prepared, filtered, values, reference=last).delta[SCALARS] for last in (exact.delta, None)
    )
    assert np.abs(near).mean() > 2 * np.abs(plain).mean()
    assert (near < 0).all()  # the change points against the gradient
