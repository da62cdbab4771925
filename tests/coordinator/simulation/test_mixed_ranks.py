"""Fleets whose devices hold slices of unlike ranks, by the caps that they grant."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from coordinator.config import run_config
from coordinator.rounds import tasks
from coordinator.rounds.deltas import check_delta
from coordinator.rounds.memory_requirements import rank_for, required_bytes
from coordinator.simulation.record import Record
from edge_runtime.errors import ConfigError, SliceError
from edge_runtime.package.manifest import Manifest, SliceSpec, TensorSpec
from edge_runtime.package.package import Package
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.simulation.conftest import Workshop
from tests.coordinator.simulation.mixed_caps import handed_out, simulate_mixed
from tests.edge_runtime.bigram import SLICE
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.memory.test_plan import MODEL
from tests.edge_runtime.ranked_bigram import RANK, A, B, write_ranked_bigram

CAP = 512 << 20
RUN = {
    "rank_mode": "dynamic_frozen",
    "rounds": 3,
    "devices_per_round": 6,
    "steps": 3,
    "draws": 8,
    "server_optimizer": {"slices": {"name": "sgd", "rate": 0.01}},
}


@pytest.fixture
def ranked(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop with the ranked model, so small that a rule in place of the planner's gives half a cap one rank."""
    (workshop.folder / "ranked").mkdir()
    write_ranked_bigram(workshop.folder / "ranked", generate_key())

    def by_cap(manifest: Manifest, config: object, slices: object, cap_bytes: int, leave: int) -> int:
        return RANK if cap_bytes == CAP else 1

    monkeypatch.setattr(tasks, "rank_for", by_cap)
    return workshop


def simulate(workshop: Workshop, output: str, half: float = 1 / 3, **run: object) -> Record:
    """Six devices, of which a share grants half the cap."""
    return simulate_mixed(workshop, "ranked", output, half, {**RUN, **run})


def test_devices_of_half_the_cap_take_part_with_fewer_ranks(ranked: Workshop) -> None:
    """One device in three holds one rank: it is sent and sends less, and the run learns and ends the same again."""
    record = simulate(ranked, "out")
    found = handed_out(ranked.folder / "out")
    assert sorted(task.rank for task in found) == [1] * 6 + [RANK] * 12
    assert not {each.state for each in found if each.rank == 1} & {
        each.state for each in found if each.rank == RANK
    }
    assert simulate(ranked, "again").values_sha256 == record.values_sha256
    assert record.points[-1].loss < record.points[0].loss
    large = simulate(ranked, "large", half=0.0).points[-1]
    assert large.bytes_up > record.points[-1].bytes_up
    assert large.bytes_down > record.points[-1].bytes_down


def test_scalars_come_to_the_same_values(ranked: Workshop) -> None:
    """Devices that send their jvps alone end the run with the bits of devices that send their changes."""
    weights = simulate(ranked, "weights", directions="one_slice", draws=2)
    scalars = simulate(ranked, "scalars", directions="one_slice", draws=2, report="scalars")
    assert scalars.values_sha256 == weights.values_sha256


def test_a_rank_that_was_not_given_is_refused(ranked: Workshop) -> None:
    """A change of two ranks for a task of one is refused by name, and so is one of all ranks."""
    manifest = Package.open_unsigned(ranked.folder / "ranked").manifest
    task = msgspec.structs.replace(
        TASK, slices=(SLICE,), train_head=False, rank_mode="dynamic", rank=1, report="weights"
    )
    for rank in (2, RANK):
        change = {A: np.zeros((1, rank, 6), np.float32), B: np.zeros((1, 6, rank), np.float32)}
        with pytest.raises(SliceError, match=rf"{B.replace('B', 'A')} is float32\(1, {rank}, 6\), expected"):
            check_delta(manifest, task, encode_values(change))
    check_delta(
        manifest,
        task,
        encode_values({A: np.zeros((1, 1, 6), np.float32), B: np.zeros((1, 6, 1), np.float32)}),
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"robust_mean": "median"}, 'take "none" or "clipped"'),
        (
            {"lora_aggregation": "product_svd", "server_optimizer": {"slices": {"name": "sgd", "rate": 1.0}}},
            "at .factors",
        ),
        ({"local_optimizer": {"name": "adamw"}}, "accumulate"),
    ],
)
def test_runs_that_cannot_have_ranks_are_refused(ranked: Workshop, run: dict, message: str) -> None:
    """What would mix unlike ranks is refused when the run is created, before a device is asked."""
    with pytest.raises(ConfigError, match=f"arm arm: rank_mode.*{message}"):
        ranked.simulate(run={**RUN, **run}, fleet={"devices": 6}, arms=[{"name": "arm", "package": "ranked"}])


def test_as_many_ranks_are_given_as_fit_the_cap() -> None:
    """With slices as large as a model's, a device's rank is the largest whose plan its cap admits, and one at least."""
    wide = SliceSpec(
        "s", "lora", (1,), "s", (TensorSpec("A", (1, 8, 200_000), "a"), TensorSpec("B", (1, 200_000, 8), "b"))
    )
    manifest = msgspec.structs.replace(
        MODEL, slices=(wide, *(spec for spec in MODEL.slices if spec.kind == "head"))
    )
    table = {
        "name": "r",
        "package": "p",
        "publisher_key": "A" * 43 + "=",
        "rank_mode": "dynamic",
        "rounds": 1,
        **dict.fromkeys(("seed", "steps", "batch_size", "devices_per_round"), 2),
    }
    config = run_config(table)
    needs = [required_bytes(manifest, config, ("s",), rank=rank) for rank in range(1, 9)]
    assert needs == sorted(set(needs))
    assert required_bytes(manifest, config, ("s",)) == needs[0]
    for rank, needed in enumerate(needs, 1):
        assert rank_for(manifest, config, ("s",), needed) == rank
        assert rank_for(manifest, config, ("s",), needed - 1) == max(1, rank - 1)
    assert rank_for(manifest, config, ("head",), needs[-1]) == 8
    fixed = msgspec.structs.replace(config, rank_mode="fixed")
    assert rank_for(manifest, fixed, ("s",), needs[0]) == 0
    assert required_bytes(manifest, fixed, ("s",)) == needs[-1]
