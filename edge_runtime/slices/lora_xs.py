"""LoRA-XS: a trained core between frozen singular factors (Bałazy et al. 2024, arXiv 2405.17604)."""

from __future__ import annotations

from edge_runtime.slices.kind import SliceKind

LORA_XS = SliceKind("lora_xs", ("core",))
