"""Sparse slices: chosen entries of the layer's own weight; which they are is in the package (the frozen ``index``)."""

from __future__ import annotations

from edge_runtime.slices.kind import SliceKind

SPARSE = SliceKind("sparse", ("values",))
