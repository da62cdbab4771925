"""Rows: chosen rows of the layer's own weight are trained, and others are chosen from time to time (GRASS).

Muhamed et al. 2024, "Grass: Compute Efficient Low-Memory LLM Training with Structured Sparse Gradients", EMNLP, arXiv
2406.17660. The layer's weight (m, n) changes by ``moved`` (1, m, n) + ``place`` (1, m, r) · ``rows`` (1, r, n). A
column of ``place`` has one entry that is not zero: the row that one of ``rows`` stands for, and how strongly. Devices
move ``rows`` alone; how they are chosen, and when ``moved`` takes them up, is the coordinator's
(:mod:`coordinator.aggregation.rows`).
"""

from __future__ import annotations

from edge_runtime.slices.kind import SliceKind

ROWS = SliceKind("rows", ("rows", "place", "moved"), held=("place", "moved"))
