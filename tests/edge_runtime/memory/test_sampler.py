"""The timeline of a worker, without one."""

from __future__ import annotations

from itertools import pairwise

from edge_runtime.memory.meter import ProcessMemory
from edge_runtime.memory.sampler import MAX_SAMPLES, Sampler


def memory(size: int) -> ProcessMemory:
    return ProcessMemory(
        resident_bytes=size, anonymous_bytes=size // 2, file_bytes=size - size // 2, data_bytes=0
    )


def test_a_short_run_keeps_every_look() -> None:
    """Samples carry the phase they were taken in, and the newest is at hand."""
    sampler = Sampler()
    assert sampler.last is None
    sampler.add(0.0, memory(10))
    sampler.phase = "load"
    sampler.add(0.1, memory(30))
    assert [(s.seconds, s.phase, s.resident_bytes) for s in sampler.samples] == [
        (0.0, "start", 10),
        (0.1, "load", 30),
    ]
    assert sampler.last == sampler.samples[-1]


def test_a_long_run_is_thinned_evenly_and_keeps_its_peaks() -> None:
    """However long it runs the timeline is bounded and evenly spaced, and every single peak is in it."""
    sampler = Sampler()
    peaks = {7, 1_000, 12_345, 54_321}
    for number in range(60_000):
        sampler.add(number * 0.1, memory(10_000 + number if number in peaks else 100))
    assert MAX_SAMPLES // 2 <= len(sampler.samples) < MAX_SAMPLES
    kept = {sample.resident_bytes for sample in sampler.samples}
    assert {10_000 + number for number in peaks} <= kept
    seconds = [sample.seconds for sample in sampler.samples]
    gaps = [late - early for early, late in pairwise(seconds)]
    assert min(gaps) > 0
    assert max(gaps) < 60_000 * 0.1 / len(seconds) * 3
    assert sampler.last is not None
    assert sampler.last.seconds == 59_999 * 0.1
