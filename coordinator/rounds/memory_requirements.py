"""How much memory a task needs, by the package's own prediction: the one place that asks the planner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from msgspec.structs import replace

from coordinator.config import RunConfig
from edge_runtime.memory.plan import Planner, Work
from edge_runtime.package.manifest import Manifest
from edge_runtime.worker.session import sums_work


def required_bytes(manifest: Manifest, config: RunConfig, slices: Sequence[str], rows: int = 0) -> int:
    """The smallest cap under which a device has a plan to train some slices, or to sum up its features.

    What a device has measured does not enter, only what its operator declared: measurements vary by a little, and seats
    that hung on them would make runs of one seed end in different bits.

    Args:
        manifest: manifest of the package, as the run sees it.
        config: settings of the task.
        slices: names of the slices, the head's possibly among them. Every plan has room for the head's exact gradient;
            a perturbed head is planned like a slice.
        rows: number of the device's rows, on which sums for a head in closed form depend.

    Returns:
        the cap in bytes.
    """
    sequence = min(config.sequence_limit, manifest.sequence_limit)
    if config.head == "closed_form":
        return _smallest_cap(_Same(manifest), sums_work(manifest, config, max(1, rows), sequence))
    exact_head = None if manifest.head is None or config.head == "perturbed" else manifest.head.name
    work = Work(
        batch_size=config.batch_size,
        sequence=sequence,
        draws=config.draws,
        slices=tuple(name for name in slices if name != exact_head),
        update=config.update,
    )
    return _smallest_cap(_Same(manifest), work)


class _Same:
    """A manifest as a key of the cache: known by being the same object, since comparing its content would cost more."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __hash__(self) -> int:
        return id(self.manifest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.manifest is self.manifest


@lru_cache(maxsize=4096)  # every check-in asks, and a plan takes milliseconds
def _smallest_cap(same: _Same, work: Work) -> int:
    if work.update == "best":  # what any device can do that is asked, with adjoint programs or without
        work = replace(work, update="forward", draws=1)
    return Planner(same.manifest).smallest_cap(work)
