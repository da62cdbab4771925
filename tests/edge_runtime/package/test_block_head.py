"""Which blocks a head reads: checked against the package, chosen where nobody says, told by the values themselves."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from msgspec import UNSET

from edge_runtime.errors import ConfigError, PackageError, SliceError
from edge_runtime.package.block_head import (
    MAX_WIDTH,
    PREFERRED_WIDTH,
    default_blocks,
    head_of,
    with_block_head,
)
from edge_runtime.package.manifest import Manifest, parse_manifest
from edge_runtime.package.slices import decode_values, encode_values, shapes
from edge_runtime.protocol import messages
from tests.edge_runtime.packages import make_manifest


def deep(blocks: int, hidden_size: int = 8) -> Manifest:
    """A manifest with an embedding, so many blocks and a head."""
    raw = make_manifest()
    segments = (*raw.segments[:1] * (blocks + 1), raw.segments[-1])
    base = msgspec.structs.replace(raw.base, hidden_size=hidden_size)
    return msgspec.structs.replace(raw, segments=segments, base=base)


def test_no_blocks_leave_the_package_as_it_is() -> None:
    """Without features a run sees the package's own head."""
    manifest = deep(2)
    assert with_block_head(manifest, ()) is manifest


def test_the_head_has_the_width_of_what_it_reads() -> None:
    """Weight and bias fit the blocks; other slices, and the package's file, stay as they are."""
    manifest = deep(4)
    seen = with_block_head(manifest, (1, 3, 4), "max")
    assert seen.head is not None
    assert shapes([seen.head]) == {"head/weight": (2, 24), "head/bias": (2,)}
    assert [s for s in seen.slices if s.kind != "head"] == [s for s in manifest.slices if s.kind != "head"]
    assert (seen.head_features, len(seen.segments_run)) == ("max", 5)
    assert len(with_block_head(manifest, (0, 2)).segments_run) == 3
    assert len(manifest.segments_run) == 6


@pytest.mark.parametrize(
    ("blocks", "says"),
    [((5,), "to 4"), ((1, 1), "once and in order"), ((2, 1), "once and in order")],
)
def test_blocks_that_are_not_there_are_refused(blocks: tuple[int, ...], says: str) -> None:
    """A block behind the last, twice, or out of order is refused, and the message says which there are."""
    with pytest.raises(ConfigError, match=says):
        with_block_head(deep(4), blocks)


def test_features_that_are_too_wide_are_refused_with_blocks_that_are_not() -> None:
    """The way out that the message names can be taken."""
    wide = deep(12, hidden_size=768)
    with pytest.raises(ConfigError, match=f"limit is {MAX_WIDTH}") as refused:
        with_block_head(wide, tuple(range(13)))
    named = msgspec.json.decode(str(refused.value).partition("such as ")[2])
    with_block_head(wide, tuple(named))


def test_a_language_model_has_no_head_to_read_blocks() -> None:
    """Features for a package without a head are refused."""
    raw = deep(2)
    headless = msgspec.structs.replace(
        raw, slices=tuple(spec for spec in raw.slices if spec.kind != "head"), labels=(), task="causal_lm"
    )
    with pytest.raises(ConfigError, match="language modelling"):
        with_block_head(headless, (1,))


@pytest.mark.parametrize(
    ("blocks", "size", "chosen"),
    [
        (6, 384, (0, 1, 2, 3, 4, 5, 6)),
        (12, 768, (1, 4, 7, 9, 12)),
        (24, 1024, (1, 9, 16, 24)),
        (32, 4096, (32,)),
        (1, 8, (0, 1)),
    ],
)
def test_blocks_are_chosen_evenly_up_to_a_width(blocks: int, size: int, chosen: tuple[int, ...]) -> None:
    """All outputs where they are narrow enough, else evenly spread ones from the first block to the last."""
    manifest = deep(blocks, size)
    assert default_blocks(manifest) == chosen
    assert len(chosen) * size <= max(PREFERRED_WIDTH, size)
    with_block_head(manifest, chosen)


def test_equal_values_give_equal_bytes_with_what_their_head_reads() -> None:
    """The bytes of values with metadata are the same each time: their digest names them."""
    seen = with_block_head(deep(2), (1, 2), "mean")
    values = {name: np.ones(shape, np.float32) for name, shape in shapes(seen.slices).items()}
    assert len({encode_values(values, seen) for _ in range(40)}) == 1


def test_values_tell_what_their_head_reads() -> None:
    """Metadata of a file of values name blocks and pooling; a package's own values name none."""
    seen = with_block_head(deep(3), (0, 3), "first")
    values = {name: np.ones(shape, np.float32) for name, shape in shapes(seen.slices).items()}
    data = encode_values(values, seen)
    assert head_of(data) == ((0, 3), "first")
    assert set(decode_values(data, seen.slices)) == set(values)
    assert head_of(encode_values(values)) == ((), "package")


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 40, (10**6).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]"]
)
def test_bytes_that_are_no_values_tell_nothing(data: bytes) -> None:
    """Bytes without a header of safetensors are refused as slice values."""
    with pytest.raises(SliceError):
        head_of(data)


def test_a_packages_file_must_not_claim_a_runs_head() -> None:
    """A manifest that names blocks for its head, or a pooling that only runs have, is refused when it is read."""
    for change in ({"head_blocks": (0,)}, {"features": "max"}):
        manifest = msgspec.structs.replace(make_manifest(), **change)
        with pytest.raises(PackageError, match="a package's own reads the last one"):
            parse_manifest(messages.encode(manifest))
    assert parse_manifest(messages.encode(make_manifest())).head_blocks is UNSET
