from __future__ import annotations

import pytest
from msgspec import UNSET
from msgspec.structs import replace

from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Manifest, SliceSpec, TensorSpec
from edge_runtime.package.ranks import factor_of, fed_shape, rank_of, with_rank
from tests.edge_runtime.packages import make_manifest

LORA = SliceSpec(
    "block0.query", "lora", (0,), "query", (TensorSpec("A", (1, 4, 6), "a"), TensorSpec("B", (1, 8, 4), "b"))
)


def manifest() -> Manifest:
    """The little package with a LoRA slice of rank 4 beside its head."""
    made = make_manifest()
    return replace(made, slices=(LORA, *made.slices[1:]))


def test_a_lower_rank_has_smaller_tensors_for_the_same_programs() -> None:
    """At rank 3 A loses a row and B a column, programs take what they took, and the scale is that of three ranks."""
    seen = with_rank(manifest(), 3)
    a, b = seen.slices[0].tensors
    assert (a.shape, b.shape) == ((1, 3, 6), (1, 8, 3))
    assert (fed_shape(a), fed_shape(b)) == ((1, 4, 6), (1, 8, 4))
    assert factor_of(seen.slices[0]) == pytest.approx(4 / 3)
    assert seen.slices[1:] == manifest().slices[1:]
    assert seen.programs == manifest().programs


def test_all_ranks_are_the_package_itself() -> None:
    """Rank 0 and the package's own change nothing; a package that was cut is cut further from what programs take."""
    assert with_rank(manifest(), 0) is not None
    assert with_rank(manifest(), 0).slices == with_rank(manifest(), 4).slices == manifest().slices
    assert manifest().slices[0].tensors[0].fed is UNSET
    assert with_rank(with_rank(manifest(), 3), 1) == with_rank(manifest(), 1)
    assert rank_of(with_rank(manifest(), 3)) == 3


def test_a_rank_that_is_not_there_is_refused() -> None:
    """A rank beyond the package's, or of slices that have one alone, is refused with what to take."""
    with pytest.raises(ConfigError, match="rank 5 exceeds package little's; take one from 1 to 4"):
        with_rank(manifest(), 5)
    with pytest.raises(ConfigError, match="take one from 1 to 3"):
        with_rank(with_rank(manifest(), 3), 4)
    with pytest.raises(ConfigError, match="export it with --slice lora"):
        with_rank(make_manifest(), 1)
