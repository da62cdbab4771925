"""Names, shapes and types of the tensors of a PyTorch file, read without torch and without running anything of it.

A file that ``torch.save`` wrote is a zip archive: ``data.pkl`` has the dictionary of tensors, each of which asks for a
storage by type and key, and for a function that puts size and strides around it (``torch.serialization``). Here these
names stand for what merely notes size and type; every other name is refused, as ``weights_only`` refuses it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.errors import ModelError
from export.adapters.peft_names import WEIGHTS

#: Types by the storages that hold them, as torch names both.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
#: A directory of tensors is small; what is larger is left to torch.
MAX_DIRECTORY_BYTES = 16 << 20


class Described(NamedTuple):
    """A tensor's shape, and its type as torch names it."""

    shape: tuple[int, ...]
    dtype: str


def describe_pickled(path: Path) -> dict[str, Described] | None:
    """The tensors of a PyTorch file by name; None where only torch can tell, as of files from before torch 1.6.

    Raises:
        ModelError: the file asks to run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (directory,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            if archive.getinfo(directory).file_size > MAX_DIRECTORY_BYTES:
                return None
            found = _Directory(archive.read(directory), path).load()
    except (OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError):
        return None
    except (ArithmeticError, AttributeError, EOFError, LookupError, TypeError):  # what damaged pickles raise
        return None
    if not isinstance(found, dict) or not all(isinstance(value, Described) for value in found.values()):
        return None
    return {str(name): value for name, value in found.items()}


class _Directory(pickle.Unpickler):
    """Reads ``data.pkl``; nothing that it names is imported or called."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module.partition(".")[0] in ("torch", "numpy", "collections"):
            raise pickle.UnpicklingError(f"{module}.{name}")  # torch knows which of these are harmless
        raise ModelError(asks_to_run_code(self._path, f"{module}.{name}"))

    def persistent_load(self, pid: Any) -> str:
        """The type of a storage, of ``("storage", type, key, location, count)``."""
        return str(pid[1])


def _tensor(storage: str, _offset: int, size: tuple[int, ...], *_: object) -> Described:
    return Described(tuple(int(side) for side in size), f"torch.{storage}")


def _parameter(tensor: Described, *_: object) -> Described:
    return tensor


def asks_to_run_code(path: Path, wanted: str) -> str:
    """The sentence that refuses a file which would run code."""
    return (
        f"{path} asks to run code when it is opened ({wanted}); none was run. A file of tensors asks for "
        f"nothing: save the adapter as {WEIGHTS}, or get it from somebody you trust"
    )
