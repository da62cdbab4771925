from __future__ import annotations

from msgspec.structs import replace

from edge_runtime.package.held import held_tensors, moved_part
from tests.edge_runtime.rows_bigram import COUNT, HIDDEN, SPEC


def test_devices_move_what_is_not_held() -> None:
    """Of a slice of rows only these are moved; a slice of another kind, and a head, are moved whole."""
    assert held_tensors(SPEC) == ("place", "moved")
    assert [tensor.name for tensor in moved_part(SPEC).tensors] == ["rows"]
    assert moved_part(SPEC).dimensions == COUNT * HIDDEN
    for kind in ("lora_xs", "head"):
        other = replace(SPEC, kind=kind)
        assert moved_part(other) == other
