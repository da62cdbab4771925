"""LoRA averaged by factors, by products, or with A frozen."""

from __future__ import annotations

import tracemalloc

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.aggregation.low_rank import factorise
from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.server_state import ServerState
from coordinator.aggregation.server_step import server_update
from coordinator.config import run_config
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import Values, decode_values, shapes
from tests.coordinator.conftest import LORA_SPECS, RUN, SPECS, World, lora_spec

OUT, IN = 6, 4


def matrix(seed: int, *shape: int) -> np.ndarray:
    """Random float32 numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def product(values: Values) -> np.ndarray:
    """B A of the slice l."""
    return values["l/B"][0].astype(np.float64) @ values["l/A"][0].astype(np.float64)


def averaged(lora_aggregation: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The product after a round of three unequal devices, and the mean of their products."""
    config = run_config(
        {**RUN, "package": "p", "publisher_key": "A" * 43 + "=", "lora_aggregation": lora_aggregation}
    )
    spec: SliceSpec = lora_spec("l", OUT, IN, rank)
    values = {"l/A": matrix(1, 1, rank, IN), "l/B": matrix(2, 1, OUT, rank)}
    contributions = [
        Contribution(examples, {"l/A": matrix(seed, 1, rank, IN), "l/B": matrix(seed + 1, 1, OUT, rank)})
        for examples, seed in ((1, 10), (5, 20), (3, 30))
    ]
    moved = server_update(
        values, ServerState(), contributions, config=config, specs=[spec], round_number=0, committed=0
    )
    wanted = sum(
        each.examples * product({name: values[name] + each.delta[name] for name in values}) / 9
        for each in contributions
    )
    return product(moved.values), np.asarray(wanted)


def test_full_rank_products_are_exact() -> None:
    """At full rank the new factors give the weighted mean of the devices' products to 1e-6; means of factors do not."""
    got, wanted = averaged("product_svd", rank=IN)
    assert np.abs(got - wanted).max() < 1e-6 * np.abs(wanted).max()
    got, wanted = averaged("factors", rank=IN)
    assert np.abs(got - wanted).max() > 0.05 * np.abs(wanted).max()


def test_below_full_rank_products_are_the_closest() -> None:
    """The error of the mean product is that of the singular values left out, and below that of mean factors."""
    got, wanted = averaged("product_svd", rank=2)
    left_out = np.linalg.svd(wanted, compute_uv=False)[2:]
    assert np.linalg.norm(got - wanted) == pytest.approx(np.linalg.norm(left_out), rel=1e-5)
    got, _ = averaged("factors", rank=2)
    assert np.linalg.norm(got - wanted) > np.linalg.norm(left_out)


@given(st.integers(1, 4), st.integers(0, 1000))
def test_factors_are_balanced_and_stay(rank: int, seed: int) -> None:
    """New factors have equal Gram matrices, and the same product again gives the same factors: nothing turns."""
    a, b = matrix(seed, rank, IN).astype(float), matrix(seed + 1, OUT, rank).astype(float)
    first_a, first_b = factorise(b @ a, a, b)
    np.testing.assert_allclose(first_b @ first_a, b @ a, atol=1e-9)
    np.testing.assert_allclose(first_b.T @ first_b, first_a @ first_a.T, atol=1e-9)
    again_a, again_b = factorise(first_b @ first_a, first_a, first_b)
    np.testing.assert_allclose(again_a, first_a, atol=1e-6)
    np.testing.assert_allclose(again_b, first_b, atol=1e-6)


def test_small_changes_turn_factors_little() -> None:
    """Factors of a product that moved a little have moved a little, in spite of signs and equal singular values."""
    a, b = np.eye(3, IN), np.eye(OUT, 3)  # all singular values are one
    moved = b @ a + 1e-5 * matrix(5, OUT, IN)
    new_a, new_b = factorise(moved, a, b)
    assert np.abs(new_a - a).max() < 1e-4
    assert np.abs(new_b - b).max() < 1e-4


def test_a_product_of_zero_keeps_its_a() -> None:
    """Before the first step B is 0; A stays what it was, so that there is something to learn from."""
    a = matrix(3, 2, IN).astype(float)
    new_a, new_b = factorise(np.zeros((OUT, IN)), a, np.zeros((OUT, 2)))
    np.testing.assert_allclose(new_a, a, atol=1e-12)
    assert not new_b.any()


def test_a_product_of_lower_rank_keeps_a_full_rank_a() -> None:
    """Where the product has rank 1 of 2, A still has rank 2, and the product is what it was."""
    a = matrix(3, 2, IN).astype(float)
    b = np.zeros((OUT, 2))
    b[:, 0] = 1.0
    new_a, new_b = factorise(b @ a, a, b)
    np.testing.assert_allclose(new_b @ new_a, b @ a, atol=1e-9)
    assert np.linalg.matrix_rank(new_a) == 2


def payload(data: bytes) -> int:
    """Bytes of a safetensors file behind its header."""
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.parametrize(
    ("lora_aggregation", "numbers"),
    [("factors", 2 * (7 + 5)), ("product_svd", 2 * (7 + 5)), ("frozen_a", 2 * 7)],
)
def test_bytes_up_are_the_formula(tmp_path: object, lora_aggregation: str, numbers: int) -> None:
    """A LoRA slice costs r (d_in + d_out) floats on its way up, r d_out where A is frozen; a frozen A stays."""
    world = World(tmp_path, specs=LORA_SPECS)  # type: ignore[arg-type]
    world.fleet("a", "b")
    world.create_run(lora_aggregation=lora_aggregation, train_head=False, rounds=1)
    before = decode_values(world.values(), LORA_SPECS)
    world.play()
    sent = []
    for device in world.devices.values():
        task = device.task()
        assert task is not None
        assert task.freeze_a == (lora_aggregation == "frozen_a")
        result = device.result(task)
        assert device.deliver(result).json() == {"status": "counted"}
        assert payload(result.change) == 4 * numbers
        sent.append(len(result.change))
    world.play()
    after = decode_values(world.values(), LORA_SPECS)
    assert world.run()["rounds"][0]["bytes_up_per_task"] == sum(sent) / 2
    for name in shapes(LORA_SPECS[:2]):
        frozen = lora_aggregation == "frozen_a" and name.endswith("/A")
        assert np.array_equal(after[name], before[name]) == frozen


def test_a_frozen_a_is_not_taken(tmp_path: object) -> None:
    """A delta of a frozen A is refused: the task did not ask for it."""
    world = World(tmp_path, specs=LORA_SPECS)  # type: ignore[arg-type]
    device, *_ = world.fleet("a", "b")
    world.create_run(lora_aggregation="frozen_a")
    world.play()
    task = device.task()
    assert task is not None
    answer = device.deliver(device.result(msgspec.structs.replace(task, freeze_a=False)))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_slices")
    assert "/A" in answer.json()["message"]


@pytest.mark.parametrize("lora_aggregation", ["frozen_a", "product_svd"])
def test_other_slices_have_no_factors(world: World, lora_aggregation: str) -> None:
    """A package of LoRA-XS cannot be averaged by LoRA's factors; the run is refused with what to do."""
    assert {spec.kind for spec in SPECS} == {"lora_xs", "head"}
    answer = world.admin("POST", "/v1/admin/runs", world.config(lora_aggregation=lora_aggregation))
    assert answer.status_code == 422
    assert "--slice lora" in answer.json()["message"]


def test_memory_is_one_matrix_a_slice() -> None:
    """Twenty devices take no more memory than two: their products are added up one at a time."""
    side = 128
    spec = lora_spec("l", side, side, 4)
    values = {"l/A": matrix(1, 1, 4, side), "l/B": matrix(2, 1, side, 4)}
    config = run_config(
        {**RUN, "package": "p", "publisher_key": "A" * 43 + "=", "lora_aggregation": "product_svd"}
    )

    def peak(devices: int) -> int:
        contributions = (
            Contribution(1, {"l/A": matrix(i, 1, 4, side), "l/B": matrix(i, 1, side, 4)})
            for i in range(devices)
        )
        tracemalloc.start()
        server_update(
            values, ServerState(), contributions, config=config, specs=[spec], round_number=0, committed=0
        )
        (_, most), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()
        return most

    assert peak(20) < 1.2 * peak(2)
