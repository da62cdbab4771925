"""All kinds of slices, by name."""

from __future__ import annotations

from edge_runtime.slices.kind import SliceKind
from edge_runtime.slices.lora import LORA
from edge_runtime.slices.lora_xs import LORA_XS
from edge_runtime.slices.rows import ROWS
from edge_runtime.slices.sparse import SPARSE

KINDS: dict[str, SliceKind] = {kind.name: kind for kind in (LORA_XS, LORA, SPARSE, ROWS)}
