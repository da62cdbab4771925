"""A head that reads several blocks, and a package as a run with such a head sees it.

What an encoder knows is not all in its last block (Evci et al. 2022, "Head2Toe", arXiv 2201.03529). Here a head reads
the pooled outputs of chosen blocks side by side. Each block's vector is scaled to length sqrt(hidden size), so a row's
features have the squared length blocks · hidden size, whatever its text. No program of the package changes: the head
is computed beside them (:mod:`edge_runtime.execution.pooled_head`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct, field
from msgspec.structs import replace

from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import ConfigError, SliceError
from edge_runtime.package.manifest import Features, Manifest, TensorSpec, fresh_features
from edge_runtime.protocol.messages import Blocks, Pooling

#: Numbers of a row's features: as many as the choice of blocks takes by itself, and as many as a run may ask for. The
#: sums of the widest fit one result.
PREFERRED_WIDTH, MAX_WIDTH = 4096, 5632
#: Keys of the metadata by which a file of slice values says what its head reads.
BLOCKS, POOLING, EXITS = "blocks", "pooling", "exits"
MAX_HEADER_BYTES = 1 << 20


def with_block_head(
    manifest: Manifest, blocks: Sequence[int], pooling: Pooling = "package", exits: Sequence[int] = ()
) -> Manifest:
    """The manifest as a run sees it whose head reads some blocks: its head has their width, and a bias.

    Args:
        manifest: manifest of the package.
        blocks: numbers of the blocks, 0 being the embedding's output; empty leaves the manifest as it is.
        pooling: way to make one vector of a text's hidden states.
        exits: numbers of the blocks that the head may read one at a time; empty for none.

    Raises:
        ConfigError: the package has no such block, or no head; or the features are too wide.
    """
    if not blocks:
        return manifest
    head = manifest.head
    if head is None:
        raise ConfigError(
            f"features belong to a head, and package {manifest.name} has none: it is for language modelling; "
            "leave features out"
        )
    last = len(manifest.segments) - 2
    if list(blocks) != sorted(set(blocks)) or blocks[-1] > last:
        raise ConfigError(
            f"features = {list(blocks)} must name blocks of package {manifest.name} once and in order, from 0 (the "
            f"embedding's output) to {last}"
        )
    width = len(blocks) * manifest.base.hidden_size
    if width > MAX_WIDTH:
        raise ConfigError(
            f"features of {len(blocks)} blocks are {width} numbers a row, and the limit is {MAX_WIDTH}; name at most "
            f"{MAX_WIDTH // manifest.base.hidden_size} blocks, such as {list(default_blocks(manifest))}"
        )
    shapes = {"weight": (len(manifest.labels), width), "bias": (len(manifest.labels),)}
    tensors = tuple(TensorSpec(name, shape, f"{head.name}.{name}") for name, shape in shapes.items())
    own = replace(head, tensors=tensors)
    return replace(
        manifest,
        slices=tuple(own if spec.name == head.name else spec for spec in manifest.slices),
        features=_pooling(manifest, pooling),
        own_labels=UNSET,
        head_blocks=tuple(blocks),
        head_exits=tuple(exits) or UNSET,
    )


def head_of(data: bytes) -> tuple[Blocks, Pooling]:
    """Which blocks the head of some values reads, and how they are pooled; no blocks for the package's own head.

    Args:
        data: bytes of a file of slice values, or as many of its first as a header may have.

    Raises:
        SliceError: the bytes are no safetensors file, or their metadata make no sense.
    """
    try:
        found = _metadata(data)
        blocks = msgspec.convert(found.get(BLOCKS, "").split(), Blocks, strict=False)
        return blocks, msgspec.convert(found.get(POOLING, "package"), Pooling)
    except MALFORMED as error:
        raise SliceError(f"slice values do not say what their head reads: {error}") from error


def exits_of(data: bytes) -> Blocks:
    """The exits that some values were trained at, one for each block that their head may read; empty for none.

    Args:
        data: bytes of a file of slice values, or as many of its first as a header may have.

    Raises:
        SliceError: the bytes are no safetensors file, or their metadata make no sense.
    """
    try:
        return msgspec.convert(_metadata(data).get(EXITS, "").split(), Blocks, strict=False)
    except (msgspec.MsgspecError, *MALFORMED) as error:
        raise SliceError(f"slice values do not say what exits they have: {error}") from error


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    # Of a header that is too long, or cut short, nothing is read.
    end = 8 + size if size <= min(MAX_HEADER_BYTES, len(data) - 8) else 8
    return msgspec.json.decode(data[8:end], type=_Header).metadata


class _Header(Struct):
    metadata: dict[str, str] = field(default_factory=dict, name="__metadata__")


def default_blocks(manifest: Manifest) -> tuple[int, ...]:
    """The blocks that a head in closed form reads where a run names none.

    All of them; or where that is too wide evenly spread ones from block 1 to the last, which know more than with the
    embedding's output among them (docs/decisions/0022-closed-form.md).
    """
    last = len(manifest.segments) - 2
    most = max(1, PREFERRED_WIDTH // manifest.base.hidden_size)
    if most > last:
        return tuple(range(last + 1))
    if most == 1:
        return (last,)
    return tuple(sorted({1 + round(number * (last - 1) / (most - 1)) for number in range(most)}))


def _pooling(manifest: Manifest, pooling: Pooling) -> Features:
    if pooling != "package":
        return pooling
    own = manifest.head_features
    return fresh_features(manifest.base.causal) if own == "own" else own
