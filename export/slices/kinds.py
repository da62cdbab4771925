"""The exporter's class of each kind of slices, by the names of :mod:`edge_runtime.slices.kinds`."""

from __future__ import annotations

from edge_runtime.slices.kinds import KINDS as KNOWN
from export.slices.lora import LoraLinear
from export.slices.lora_xs import LoraXsLinear
from export.slices.rows import RowsLinear
from export.slices.sparse import SparseLinear

KINDS = {"lora_xs": LoraXsLinear, "lora": LoraLinear, "sparse": SparseLinear, "rows": RowsLinear}
#: Names of all trained tensors; no parameter of a model is called so.
TRAINED = frozenset(name for kind in KNOWN.values() for name in kind.tensors)
#: Those of them that no device moves: programs take no tangents of them.
HELD = frozenset(name for kind in KNOWN.values() for name in kind.held)
