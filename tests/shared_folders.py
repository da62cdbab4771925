"""Folders that take long to make and that many tests read: made once for all test processes of a run.

They lie under build/test-packages, in a folder named by a digest of everything that makes them, so nothing outlives a
change of source. A lock lets one process make a folder while others wait for it. Readers must leave it as it is: copy
it to change it. File modes do not guard that, because they bind no root, and a copy would inherit them. Instead each
process compares every folder it used with the digest taken when it was made, and the session fails if one differs.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/test-packages"
#: The code that makes packages, and the libraries it makes them with.
SOURCES = ("export", "edge_runtime", "tests/export/tiny.py", "tests/vocabulary.py", "tests/shared_folders.py")
LIBRARIES = (
    *("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "safetensors", "tokenizers", "torch"),
    "transformers",
)
#: Every process that uses a folder of sources keeps this file of it locked.
IN_USE = ".in-use"
_used: set[Path] = set()


def shared_folder(name: str, key: object, make: Callable[[Path], object]) -> Path:
    """The folder of this name and key; ``make`` fills it if no process has.

    Args:
        name: begins the folder's name. key: all that ``make`` depends on, beside SOURCES; its repr counts.
        make: called with a folder that does not exist yet; the folder is renamed into place when it returns.
    """
    folder, _ = _opened()
    place = folder / f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    with _locked(place.with_suffix(".lock"), fcntl.LOCK_EX):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as scratch:
                made = Path(scratch) / place.name
                make(made)
                _record(place).write_text(digest_of(made))
                made.rename(place)
        _used.add(place)
    return place


def digest_of(folder: Path) -> str:
    """sha256 over names and contents of all files of a folder."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)}\0".encode())
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def changed_folders() -> list[Path]:
    """Folders this process used that are not as they were made; they are removed, so that the next run is sound."""
    changed = [place for place in sorted(_used) if digest_of(place) != _record(place).read_text()]
    for place in changed:
        shutil.rmtree(place)
    return changed


def remove_old_folders() -> None:
    """Remove what other sources made, unless a run that goes on still uses it."""
    for folder in FOLDER.glob("*/"):
        if folder != _current():
            with suppress(BlockingIOError), _locked(folder / IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(folder)


def _record(place: Path) -> Path:
    return place.with_suffix(".sha256")


@functools.cache
def _current() -> Path:
    whole = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            whole.update(f"{file.relative_to(ROOT)}\0".encode())
            whole.update(hashlib.sha256(file.read_bytes()).digest())
    whole.update(repr([(name, metadata.version(name)) for name in LIBRARIES]).encode())
    return FOLDER / whole.hexdigest()[:16]


@functools.cache
def _opened() -> tuple[Path, IO[bytes]]:
    """The folder of these sources, and the lock that tells other runs so until this process ends."""
    _current().mkdir(parents=True, exist_ok=True)
    return _current(), _locked(_current() / IN_USE, fcntl.LOCK_SH)


def _locked(path: Path, how: int) -> IO[bytes]:
    """An open file with a lock on it, which ends with the file."""
    file = path.open("ab")
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        file.close()
        raise
    return file
