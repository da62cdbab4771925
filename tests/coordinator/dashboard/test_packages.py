"""Packages that were uploaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coordinator.dashboard import packages
from edge_runtime.errors import PackageError, SignatureError
from tests.coordinator.conftest import World


def copied(world: World, folder: Path) -> dict[str, Path]:
    """The files of the world's package, copied, as a form has them."""
    shutil.copytree(world.package, folder)
    return {f"package/{path.name}": path for path in folder.iterdir()}


def test_a_package_is_kept_whole_or_not_at_all(world: World, tmp_path: Path) -> None:
    """A package that its publisher signed is kept under its digest; else nothing is, and nothing is left behind."""
    key = world.publisher.public_key
    with pytest.raises(SignatureError, match="nothing was kept"):
        packages.keep(world.stores, copied(world, tmp_path / "a"), "A" * 43 + "=")
    assert packages.uploaded(world.stores) == []
    kept = packages.keep(world.stores, copied(world, tmp_path / "b"), key)
    again = packages.keep(world.stores, copied(world, tmp_path / "c"), key)
    assert kept.sha256 == again.sha256
    (found,) = packages.uploaded(world.stores)
    assert (found.publisher_key, found.slices) == (key, 3)
    assert found.bytes == sum(entry.bytes for entry in found.manifest.files.values())
    assert list((world.stores.folder / "incoming").iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..\\x", "", "a" * 600, "a\0b"])
def test_no_name_leads_out_of_the_package(world: World, tmp_path: Path, name: str) -> None:
    """However a file is named, it is not written elsewhere."""
    files = copied(world, tmp_path / "a")
    (tmp_path / "x").write_text("x")
    with pytest.raises(PackageError):
        packages.keep(world.stores, {**files, name: tmp_path / "x"}, world.publisher.public_key)
    assert packages.uploaded(world.stores) == []
