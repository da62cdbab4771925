"""A package's weight files, written one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import Segment, TensorRef
from export.capture.segment import SegmentGraph
from export.lowering.trace import ProgramKind
from export.packaging.programs import Progress
from export.quantisation.stored import StoredModel

#: Segments start on a page, tensors on a cache line.
PAGE_BYTES, TENSOR_ALIGNMENT_BYTES = 4096, 64
BAR_WIDTH = 20

DtypeName = Literal["float32", "uint8", "int32", "int64", "bool"]


def write_segments(
    folder: Path,
    stored: StoredModel,
    names: list[dict[ProgramKind, str]],
    progress: Progress,
) -> tuple[Segment, ...]:
    """Write all frozen tensors; segments that share them, as blocks of ALBERT do, share one file.

    Args:
        folder: package that is being written; the files go to its ``weights/``.
        stored: segments of the model and their tensors.
        names: names of each segment's programs, by kind.
        progress: called with a sentence before each file.

    Returns:
        The segments for the manifest, in order.
    """
    written: dict[tuple[str, ...], dict[str, TensorRef]] = {}
    segments = []
    for index, segment in enumerate(stored.segments):
        named = _named_by_both(segment, stored.decoding[index] if stored.decoding else None)
        sources = tuple(named.values())
        if sources not in written:
            progress(_bar(index, len(stored.segments)) + f" Writing weights of {segment.name}")
            written[sources] = _write_weights(folder, segment.name, named, stored.tensors)
        made = names[index]
        segments.append(
            Segment(
                segment.name,
                made["primal"],
                made.get("entry"),
                made.get("dual"),
                weights=written[sources],
                adjoint=made.get("adjoint"),
                decode=made.get("decode"),
            )
        )
    return tuple(segments)


def _named_by_both(segment: SegmentGraph, decoding: SegmentGraph | None) -> dict[str, str]:
    """Frozen tensors of a segment and of its decode program, by name; most are the same.

    Raises:
        ModelError: a name means one tensor here and another there.
    """
    more = {} if decoding is None else decoding.weights
    for name, source in more.items():
        if segment.weights.get(name, source) != source:
            raise ModelError(
                f"{segment.name} calls two frozen tensors {name!r}, {segment.weights[name]} and {source}; "
                "export without --with-generation, and please report the model's architecture"
            )
    return {**segment.weights, **more}


def _bar(done: int, count: int) -> str:
    filled = BAR_WIDTH * done // count
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{count}"


def _write_weights(
    folder: Path, segment_name: str, named: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, TensorRef]:
    """Write one segment's frozen tensors to one file, each made, written and forgotten."""
    if not named:
        return {}
    file = f"weights/{segment_name}.bin"
    references = {}
    with (folder / file).open("wb") as out:
        for name, source in named.items():
            array = tensors[source].contiguous().numpy()  # ascontiguousarray would give a scalar an axis
            out.write(b"\0" * (-out.tell() % TENSOR_ALIGNMENT_BYTES))
            references[name] = TensorRef(file, out.tell(), _dtype_name(array), array.shape)
            array.tofile(out)
        out.write(b"\0" * (-out.tell() % PAGE_BYTES))
    return references


def _dtype_name(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> DtypeName:
    names: dict[str, DtypeName] = {
        "float32": "float32",
        "uint8": "uint8",
        "int32": "int32",
        "int64": "int64",
        "bool": "bool",
    }
    if array.dtype.name not in names:
        raise ModelError(
            f"the model holds a frozen {array.dtype.name} tensor; packages carry {', '.join(names)}"
        )
    return names[array.dtype.name]
