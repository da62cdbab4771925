"""What a parent sees of its worker while it waits: the phase it is in, and its memory over time."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.memory.meter import ProcessMemory

#: Pause between two looks at a worker. A look costs about 0.3 ms, so watching takes 0.3 % of one core.
SAMPLE_INTERVAL_S = 0.1
#: The same pause where the limit follows the worker (RLIMIT_DATA) and must not lag: 1.5 % of one core.
FOLLOW_INTERVAL_S = 0.02
#: Largest number of samples in a timeline, however long the worker runs.
MAX_SAMPLES = 512
#: The phase before the worker has named one.
FIRST_PHASE = "start"


@dataclass(frozen=True)
class Sample:
    """Memory of a worker at one moment.

    Attributes:
        seconds: time since the worker started.
        phase: phase that the worker was in.
        resident_bytes: pages in memory, the sum of the next two.
        anonymous_bytes: the worker's own pages.
        file_bytes: pages of mapped files and shared memory.
    """

    seconds: float
    phase: str
    resident_bytes: int
    anonymous_bytes: int
    file_bytes: int


class Sampler:
    """The timeline of one worker, filled by :func:`edge_runtime.worker.process.finish_worker`.

    Attributes:
        phase: phase that the worker named last.
        samples: samples in order of time, evenly spaced. Where they become too many, of every two neighbours the larger
            is kept, so that the peak is never lost.
        last: newest sample; None before the first.
    """

    def __init__(self) -> None:
        self.phase = FIRST_PHASE
        self.samples: list[Sample] = []
        self.last: Sample | None = None
        self._looks = 0
        self._looks_per_sample = 1

    def add(self, seconds: float, memory: ProcessMemory) -> None:
        """Take in one look at the worker, ``seconds`` after its start."""
        self.last = Sample(
            seconds, self.phase, memory.resident_bytes, memory.anonymous_bytes, memory.file_bytes
        )
        if self._looks % self._looks_per_sample == 0:
            self.samples.append(self.last)
        else:
            self.samples[-1] = _larger(self.samples[-1], self.last)
        self._looks += 1
        if len(self.samples) == MAX_SAMPLES and self._looks % self._looks_per_sample == 0:
            pairs = zip(self.samples[::2], self.samples[1::2], strict=True)
            self.samples = [_larger(*pair) for pair in pairs]
            self._looks_per_sample *= 2


def _larger(one: Sample, other: Sample) -> Sample:
    return other if other.resident_bytes > one.resident_bytes else one
