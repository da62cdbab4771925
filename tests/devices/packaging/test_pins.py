"""What a device installs is what its runtime loads, and no more."""

from __future__ import annotations

import subprocess
import sys

from devices.packaging.pins import PACKAGES, PINS, pins

#: Top-level modules of the packages.
MODULES = {*PACKAGES, "_cffi_backend", "edge_runtime"}
#: Imports all of the runtime in a process in which nothing else that is installed can be imported.
PROGRAM = """
import importlib, pathlib, sys, sysconfig
from importlib.machinery import PathFinder

allowed, site = set(sys.argv[2].split(",")), sysconfig.get_paths()["purelib"]

class Fence:
    def find_spec(self, name, path=None, target=None):
        spec = None if "." in name or name in allowed else PathFinder.find_spec(name)
        if spec is not None and str(spec.origin or "").startswith(site):
            raise ImportError(f"{name} is not installed on a device")

sys.meta_path.insert(0, Fence())
folder = pathlib.Path(sys.argv[1])
for path in sorted(folder.rglob("*.py")):
    if path.name != "__init__.py" and "executorch" not in path.name:
        importlib.import_module(".".join(("edge_runtime", *path.relative_to(folder).with_suffix("").parts)))
import onnxruntime, tokenizers, safetensors.numpy
from edge_runtime.protocol.signing import generate_key
generate_key().sign(b"a message")
print(" ".join(sorted(allowed & {name.partition(".")[0] for name in sys.modules})))
"""


def test_the_pins_are_those_of_the_constraints() -> None:
    """The file is what `make constraints` makes."""
    assert PINS.read_text() == pins()


def test_the_runtime_loads_what_is_pinned_and_no_more() -> None:
    """Where only the pinned packages can be imported, every module of the runtime, an engine and a key work."""
    import edge_runtime

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, edge_runtime.__path__[0], ",".join(MODULES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == MODULES - {"cffi"}
