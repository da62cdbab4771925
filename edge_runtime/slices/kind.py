"""What device and coordinator need to know of a kind of slices; what a kind computes is in its package's programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SliceKind:
    """A kind of slices.

    Attributes:
        name: name of the kind, as in a manifest and after ``--slice``.
        tensors: names of its trained tensors.
        pair: names of the two tensors A (1, r, in) and B (1, out, r) of whose product B·A the change of the layer is
            made, so that A may be frozen and the product averaged; None for a kind without.
    """

    name: str
    tensors: tuple[str, ...]
    pair: tuple[str, str] | None = None
