"""What device and coordinator need to know of a kind of slices; what a kind computes is in its package's programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SliceKind:
    """A kind of slices.

    Attributes:
        name: name of the kind, as in a manifest and after ``--slice``.
        tensors: names of its tensors, which are values of a run.
        pair: names of the two tensors A (1, r, in) and B (1, out, r) of whose product B·A the change of the layer is
            made, so that A may be frozen and the product averaged; None for a kind without.
        rank_axes: axis of each tensor along which its first entries alone are a slice of lower rank; empty for a kind
            whose rank is fixed.
        held: those of its tensors that no device moves: they come with the values, have no directions, and the
            coordinator alone changes them.
    """

    name: str
    tensors: tuple[str, ...]
    pair: tuple[str, str] | None = None
    rank_axes: Mapping[str, int] = field(default_factory=dict)
    held: tuple[str, ...] = ()
