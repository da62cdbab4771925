"""Seeded draws of devices, and who gets which slot."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds.selection import SelectableDevice, draw_order, fit, substitute


def some_devices(count: int, cap_bytes: int = 100) -> list[SelectableDevice]:
    """Devices with random-looking ids and ordered names."""
    return [SelectableDevice(f"id-{(index * 37) % 101}", f"n{index:03}", cap_bytes) for index in range(count)]


@given(st.integers(0, 30), st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.randoms())
def test_draw_depends_on_names_only(count: int, seed: int, round_number: int, random: object) -> None:
    """The same seed, round and names give the same order, whatever the ids and the order they come in."""
    devices = some_devices(count)
    shuffled = [SelectableDevice(f"x{index}", one.name, 1) for index, one in enumerate(devices)]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    names = [one.name for one in draw_order(devices, seed, round_number)]
    assert names == [one.name for one in draw_order(shuffled, seed, round_number)]
    assert sorted(names) == [one.name for one in devices]


def test_draws_differ_between_rounds_and_seeds() -> None:
    """Another round, and another seed, give another order."""
    orders = {
        tuple(one.name for one in draw_order(some_devices(20), seed, number))
        for seed in (1, 2)
        for number in (0, 1)
    }
    assert len(orders) == 4


def test_draw_is_recorded() -> None:
    """The draw never changes between releases: repeating an old run must ask the same devices."""
    assert [one.name for one in draw_order(some_devices(5), 7, 0)] == RECORDED


#: from numpy.random import Generator, PCG64, SeedSequence
#: print(Generator(PCG64(SeedSequence([7, 0]))).permutation(5))
RECORDED = ["n002", "n000", "n004", "n001", "n003"]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8), st.lists(st.integers(0, 9), min_size=1, max_size=8)
)
def test_fit_fills_what_can_be_filled(needs: list[int], caps: list[int]) -> None:
    """No device gets more than its cap, none two slots, and no slot stays empty that could be served."""
    order = [SelectableDevice(f"d{index}", f"d{index}", cap) for index, cap in enumerate(caps)]
    chosen = fit(order, len(needs), lambda slot: needs[slot])
    assert all(needs[slot] <= device.cap_bytes for slot, device in chosen.items())
    assert len({device.device_id for device in chosen.values()}) == len(chosen)
    free = list(caps)
    served = 0
    for need in sorted(
        needs
    ):  # smallest need with the smallest cap that admits it: the most that can be served
        admitting = sorted(cap for cap in free if cap >= need)
        if admitting:
            free.remove(admitting[0])
            served += 1
    assert len(chosen) == served


def test_substitute_prefers_who_has_not_failed() -> None:
    """The order decides; who lost another slot goes last, who had this slot never."""
    order = some_devices(4)
    ids = [one.device_id for one in order]

    def next_device(**sets: set[str]) -> str | None:
        empty: dict[str, set[str]] = {"busy": set(), "had_slot": set(), "failed": set()}
        device = substitute(order, 0, **{**empty, **sets}, required_bytes=lambda *_: 100)
        return device and device.device_id

    assert next_device(busy={ids[0]}) == ids[1]
    assert next_device(busy={ids[0]}, failed={ids[1]}) == ids[2]
    assert next_device(busy={ids[0], ids[2], ids[3]}, failed={ids[1]}) == ids[1]
    assert next_device(busy={ids[0], ids[2], ids[3]}, had_slot={ids[1]}) is None
    assert (
        substitute(order, 0, busy=set(), had_slot=set(), failed=set(), required_bytes=lambda *_: 101) is None
    )
