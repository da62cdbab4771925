"""LoRA: two trained factors (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from edge_runtime.slices.kind import SliceKind

LORA = SliceKind("lora", ("A", "B"), pair=("A", "B"), rank_axes={"A": 1, "B": 2})
