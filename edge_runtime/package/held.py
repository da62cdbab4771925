"""Tensors of slices that are values of a run and that no device moves (:class:`edge_runtime.slices.kind.SliceKind`)."""

from __future__ import annotations

from msgspec.structs import replace

from edge_runtime.package.manifest import SliceSpec
from edge_runtime.slices.kinds import KINDS


def held_tensors(spec: SliceSpec) -> tuple[str, ...]:
    """Names of a slice's tensors that no device moves; none of a head."""
    return KINDS[spec.kind].held if spec.kind in KINDS else ()


def moved_part(spec: SliceSpec) -> SliceSpec:
    """A slice with those of its tensors alone that devices move."""
    held = held_tensors(spec)
    return replace(spec, tensors=tuple(t for t in spec.tensors if t.name not in held)) if held else spec
