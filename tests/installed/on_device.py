"""A plugin for pytest on a device, which has no torch: packages and values come from where torch is.

``-p tests.installed.on_device`` with ``EDGE_RECORDED`` naming a folder with ``package``, ``publisher.key`` and
``values.safetensors``, as the machine that exported the package wrote them. Tests that compare with torch itself are
not for here.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from safetensors.numpy import load_file

from edge_runtime.package.package import Package
from edge_runtime.protocol.signing import PrivateKey

#: What a device does not have and the file of small models imports.
ABSENT = ("torch", "transformers", "export")
RECORDED = Path(os.environ["EDGE_RECORDED"])


class _Nothing(ModuleType):
    """A module that is not here: whatever is asked of it can be named, and called to no effect."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: None


class _Finder:
    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in ABSENT else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


class Recorded(NamedTuple):
    """A package that another machine exported; its reference is the name of the values that were recorded."""

    package: Package
    key: PrivateKey
    reference: str = "values.safetensors"


def pytest_configure() -> None:
    """Put what was recorded in the place of what makes it."""
    sys.meta_path.append(_Finder())  # type: ignore[arg-type]
    from tests.export import tiny

    key = PrivateKey.load(RECORDED / "publisher.key")
    recorded = Recorded(Package.open(RECORDED / "package", key.public_key), key)
    tiny.shared_model = lambda: RECORDED
    tiny.export_shared = lambda *_, **__: recorded
    tiny.moved_slices = lambda reference: load_file(RECORDED / str(reference))
    tiny.flat = lambda values: values
