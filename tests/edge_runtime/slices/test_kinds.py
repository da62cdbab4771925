from __future__ import annotations

import msgspec
import pytest

from edge_runtime.errors import PackageError
from edge_runtime.package.manifest import parse_manifest
from edge_runtime.slices.kinds import KINDS
from tests.edge_runtime.packages import make_manifest


def test_a_kind_is_found_by_its_own_name() -> None:
    """The table's keys are the kinds' names, and a pair is two of a kind's tensors."""
    for name, kind in KINDS.items():
        assert kind.name == name
        assert set(kind.pair or ()) <= set(kind.tensors)


def test_an_unknown_kind_is_refused() -> None:
    """A manifest with a slice of a kind that this program does not know says so, and what to do."""
    made = make_manifest()
    first, *others = made.slices
    strange = msgspec.structs.replace(first, kind="lora_of_tomorrow")
    data = msgspec.json.encode(msgspec.structs.replace(made, slices=(strange, *others)))
    with pytest.raises(PackageError, match="'lora_of_tomorrow', this program knows lora_xs, lora"):
        parse_manifest(data)
