"""How much memory a task needs, by the package's own prediction: the one place that asks the planner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from msgspec.structs import replace

from coordinator.config import RunConfig
from edge_runtime.memory.plan import Planner, Work
from edge_runtime.package.block_head import with_block_head
from edge_runtime.package.held import moved_part
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.ranks import rank_of, with_rank
from edge_runtime.protocol.messages import Blocks
from edge_runtime.training.sketch import projection_bytes
from edge_runtime.worker.session import sums_work


def required_bytes(
    manifest: Manifest, config: RunConfig, slices: Sequence[str], rows: int = 0, rank: int = 0, leave: int = 0
) -> int:
    """The smallest cap under which a device has a plan to train some slices, or to sum up its features.

    What a device has measured does not enter, only what its operator declared: measurements vary by a little, and seats
    that hung on them would make runs of one seed end in different bits.

    Args:
        manifest: manifest of the package, as the run sees it.
        config: settings of the task.
        slices: names of the slices, the head's possibly among them. Every plan has room for the head's exact gradient;
            a perturbed head is planned like a slice.
        rows: number of the device's rows, on which sums for a head in closed form depend.
        rank: number of ranks that the device holds; 0 for all of the package's, or where they are drawn the first
            alone, which any device must be able to hold.
        leave: deepest exit that the device has; 0 for the whole model, or of a run with exits the first.

    Returns:
        the cap in bytes.
    """
    leave = leave or next(iter(config.exits), 0)
    rank = rank or int(config.rank_mode != "fixed")
    same = _narrowed(_Same(manifest), rank, leave)
    if leave:
        slices = reached(manifest, slices, leave)
    sequence = min(config.sequence_limit, manifest.sequence_limit)
    if config.head == "closed_form":
        return _smallest_cap(
            same, sums_work(manifest, config, max(1, rows), sequence, as_vector=config.hides_contributions)
        )
    exact_head = None if manifest.head is None or config.head == "perturbed" else manifest.head.name
    trained = tuple(name for name in slices if name != exact_head)
    work = Work(
        batch_size=config.batch_size,
        sequence=sequence,
        draws=config.draws,
        slices=trained,
        update=config.update,
        sketch_bytes=projection_bytes(config, [moved_part(manifest.slice_named(name)) for name in trained]),
    )
    return _smallest_cap(same, work)


def rank_for(
    manifest: Manifest, config: RunConfig, slices: Sequence[str], cap_bytes: int, leave: int = 0
) -> int:
    """The number of ranks that a device with this cap is given: as many as fit; 0 where the run trains all of them.

    Args:
        manifest: manifest of the package, as the run sees it.
        config: settings of the task.
        slices: names of the slices, the head's possibly among them.
        cap_bytes: memory that the device grants; the first rank fits.
        leave: deepest exit that the device has; 0 where the run has none.
    """
    if config.rank_mode == "fixed":
        return 0
    ranks = range(rank_of(manifest), 0, -1)
    fits = (r for r in ranks if required_bytes(manifest, config, slices, rank=r, leave=leave) <= cap_bytes)
    return next(fits, 1)


def exits_for(manifest: Manifest, config: RunConfig, slices: Sequence[str], cap_bytes: int) -> Blocks:
    """The exits that a device with this cap is given: those up to the deepest that fits.

    Args:
        manifest: manifest of the package, as the run sees it.
        config: settings of the task.
        slices: names of the slices, the head's possibly among them.
        cap_bytes: memory that the device grants; the first exit fits.
    """
    fits = [e for e in config.exits if required_bytes(manifest, config, slices, leave=e) <= cap_bytes]
    return config.exits[: config.exits.index(fits[-1]) + 1] if fits else config.exits[:1]


def reached(manifest: Manifest, slices: Sequence[str], leave: int) -> tuple[str, ...]:
    """Those of the slices that lie before an exit, and a head."""
    specs = map(manifest.slice_named, slices)
    return tuple(spec.name for spec in specs if spec.kind == "head" or spec.segment <= leave)


class _Same:
    """A manifest as a key of the cache: known by being the same object, since comparing its content would cost more."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __hash__(self) -> int:
        return id(self.manifest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.manifest is self.manifest


@lru_cache(maxsize=256)  # the same object each time, by which plans are kept
def _narrowed(same: _Same, rank: int, leave: int) -> _Same:
    """A package as a device sees it that holds some ranks and leaves it behind some block; 0 for all of each."""
    if not rank and not leave:
        return same
    return _Same(with_block_head(with_rank(same.manifest, rank), (leave,) if leave else ()))


@lru_cache(maxsize=4096)  # every check-in asks, and a plan takes milliseconds
def _smallest_cap(same: _Same, work: Work) -> int:
    if work.update == "best":  # what any device can do that is asked, with adjoint programs or without
        work = replace(work, update="forward", draws=1)
    return Planner(same.manifest).smallest_cap(work)
