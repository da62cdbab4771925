"""A package at a lower rank than it was exported for, as DyLoRA trains it and any device may hold it.

A LoRA slice of rank r whose first b rows of A and columns of B are taken alone is a slice of rank b (Valipour et al.
2023, "DyLoRA", EACL, section 3). It computes (alpha / b)·B[:, :b]·A[:b]·x. No program changes: it is given A and B with
zeros in the rows and columns beyond, and B times r / b, since its own scale is alpha / r. Base weights may be stored in
4 bits all the same, as in QDyLoRA (arXiv 2402.10462).
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import UNSET
from msgspec.structs import replace

from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Manifest, SliceSpec, TensorSpec
from edge_runtime.slices.kinds import KINDS


def rank_axes(spec: SliceSpec) -> Mapping[str, int]:
    """The axis along which each of a slice's tensors may be cut; empty for kinds of a fixed rank, and for a head."""
    return KINDS[spec.kind].rank_axes if spec.kind in KINDS else {}


def scaled_tensor(spec: SliceSpec) -> str | None:
    """The tensor that makes up for a lower rank's larger scale; None for kinds of a fixed rank, and for a head."""
    pair = KINDS[spec.kind].pair if rank_axes(spec) else None
    return None if pair is None else pair[1]


def rank_of(manifest: Manifest) -> int:
    """The largest rank that all slices of a package can take; 0 if it has none that can be cut."""
    return min((_rank(spec) for spec in manifest.slices if rank_axes(spec)), default=0)


def with_rank(manifest: Manifest, rank: int) -> Manifest:
    """The manifest as a device sees it that holds the first ranks of each slice alone.

    Args:
        manifest: manifest of the package, cut before or not.
        rank: number of ranks; 0 leaves the manifest as it is.

    Raises:
        ConfigError: the package has no slices that can be cut, or none of so high a rank.
    """
    if rank == 0:
        return manifest
    most = rank_of(manifest)
    if not most:
        raise ConfigError(
            f"slices of package {manifest.name} have one rank alone; export it with --slice lora to hold fewer"
        )
    if rank > most:
        raise ConfigError(f"rank {rank} exceeds package {manifest.name}'s; take one from 1 to {most}")
    return replace(manifest, slices=tuple(at_rank(spec, rank) for spec in manifest.slices))


def at_rank(spec: SliceSpec, rank: int) -> SliceSpec:
    """A slice with its first ranks alone; one that cannot be cut stays as it is."""
    axes = rank_axes(spec)

    def cut_to(tensor: TensorSpec) -> TensorSpec:
        axis = axes.get(tensor.name)
        if axis is None or tensor.shape[axis] == rank:
            return tensor
        shape = (*tensor.shape[:axis], rank, *tensor.shape[axis + 1 :])
        return replace(tensor, shape=shape, fed=fed_shape(tensor))

    return replace(spec, tensors=tuple(map(cut_to, spec.tensors))) if axes else spec


def fed_shape(tensor: TensorSpec) -> tuple[int, ...]:
    """Shape in which a program takes a tensor."""
    return tensor.shape if tensor.fed is UNSET else tensor.fed


def factor_of(spec: SliceSpec) -> float:
    """r / b: how much larger the scale of a slice of b of r ranks is than that of its program; 1 for a whole one."""
    for tensor in spec.tensors:
        axis = rank_axes(spec).get(tensor.name)
        if axis is not None:
            return fed_shape(tensor)[axis] / tensor.shape[axis]
    return 1.0


def _rank(spec: SliceSpec) -> int:
    axes = rank_axes(spec)
    return min(tensor.shape[axes[tensor.name]] for tensor in spec.tensors if tensor.name in axes)
