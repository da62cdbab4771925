"""An adapter's tensors: names and shapes from the file's header, and values when they are needed.

Headers are read without torch. Values of a PyTorch file are opened by torch, mapped, and no code of it runs.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from edge_runtime.errors import ModelError
from edge_runtime.package.slices import FloatArray
from export.adapters.peft_names import A_SUFFIX, B_SUFFIX, PICKLED, ROOT, WEIGHTS, factor_of, plain_name
from export.adapters.pickled import Described, asks_to_run_code, describe_pickled
from export.model.folder import require_finite

if TYPE_CHECKING:
    from torch import Tensor

#: What a file begins with that git has put in the place of a large one.
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor before its values are read.

    Attributes:
        stored: name of the tensor in the file.
        shape: sides of the tensor.
        dtype: type of the values, as the file's format calls it.
        floating: whether the values are floating point.
    """

    stored: str
    shape: tuple[int, ...]
    dtype: str
    floating: bool


@dataclass(frozen=True)
class Contents:
    """The tensors of an adapter's file.

    Attributes:
        path: file that holds them.
        factors: LoRA's factors by module and factor, A (r, in) and B (out, r); each module has both.
        others: all other tensors, by plain name.
        passed_over: file of the folder that also holds an adapter's tensors, and that peft does not read; or None.
    """

    path: Path
    factors: dict[str, dict[str, Header]]
    others: dict[str, Header]
    passed_over: Path | None


def read_contents(folder: Path) -> Contents:
    """Read what an adapter folder holds, from the file that peft would take.

    Args:
        folder: adapter folder.

    Raises:
        ModelError: no file, a damaged one, one without tensors, tensors that are not floating point, one tensor under
            two names, tensors of two adapters, or half a pair.
    """
    path, passed_over = _file(folder)
    found = headers(path)
    if not found:
        raise ModelError(
            f"{path} holds no tensors; the training saved none of its adapter: save it again with "
            "model.save_pretrained(folder), without a state_dict of your own"
        )
    factors: dict[str, dict[str, Header]] = {}
    others: dict[str, Header] = {}
    adapters: set[str] = set()
    for header in found.values():
        if not header.floating:
            raise ModelError(f"{path} holds {header.stored} as {header.dtype}; adapters are floating point")
        name = plain_name(header.stored)
        factor = factor_of(name)
        if factor is None:
            place, key = others, name
        else:
            module, key, adapter = factor
            place = factors.setdefault(module, {})
            adapters |= {adapter} if adapter else set()
        if key in place:
            raise ModelError(
                f"{path} holds one tensor under two names, {place[key].stored} and {header.stored}"
            )
        place[key] = header
    if len(adapters) > 1:
        first, second = sorted(adapters)[:2]
        raise ModelError(
            f"{path} holds tensors of {len(adapters)} adapters, {first} and {second} among them; save the one to start "
            "from alone, with save_pretrained(folder, selected_adapters=[NAME])"
        )
    for module, parts in factors.items():
        if len(parts) != 2:
            raise ModelError(f"{path} has {next(iter(parts))} of {module}, but not its other factor")
    if not factors:
        first = next(iter(others.values())).stored
        raise ModelError(
            f"{path} holds {first}; only {ROOT}.MODULE.{A_SUFFIX} and {B_SUFFIX} can start a package"
        )
    return Contents(path, factors, others, passed_over)


def _file(folder: Path) -> tuple[Path, Path | None]:
    """The file that peft takes, and the one beside it that it does not."""
    present = [folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()]
    if not present:
        raise ModelError(
            f"{folder} is not a whole peft adapter folder: it has neither {WEIGHTS} nor {PICKLED}"
        )
    return present[0], present[1] if len(present) > 1 else None


def headers(path: Path) -> dict[str, Header]:
    """Names, shapes and types of all tensors of a file, by stored name.

    Args:
        path: safetensors or PyTorch file.

    Raises:
        ModelError: it is damaged, no file of tensors, or asks to run code.
    """
    _refuse_pointer(path)
    if path.suffix != ".safetensors":
        described = describe_pickled(path)
        if described is None:
            described = {
                name: Described(tuple(tensor.shape), str(tensor.dtype))
                for name, tensor in _unpickled(path).items()
            }
        return {
            name: Header(name, shape, dtype, dtype.startswith(("torch.float", "torch.bfloat")))
            for name, (shape, dtype) in described.items()
        }
    found = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                view = file.get_slice(name)
                dtype = view.get_dtype()
                found[name] = Header(name, tuple(view.get_shape()), dtype, dtype.startswith(("F", "BF")))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from error
    return found


def read_values(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a file as they are stored, finite.

    Args:
        path: safetensors or PyTorch file.
        names: stored names of the tensors.

    Raises:
        ModelError: it is damaged, or a value is not finite.
    """
    if path.suffix != ".safetensors":
        every = _unpickled(path)
        found = {name: every[name] for name in names}
    else:
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a whole safetensors file: {error}") from error
    for name, tensor in found.items():
        require_finite(f"{name} of {path}", tensor)
    return found


def as_floats(tensor: Tensor) -> FloatArray:
    """A tensor of any floating type as a float32 array of its own."""
    import torch  # noqa: PLC0415 - slow to import, and headers are read without it

    array: FloatArray = tensor.to(torch.float32, copy=True).contiguous().numpy()
    return array


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ModelError(
                f"{path} is what git keeps in the place of a large file, not the file itself; download the file"
            )


def _unpickled(path: Path) -> dict[str, Tensor]:
    import torch  # noqa: PLC0415 - slow to import, and headers are read without it

    _refuse_pointer(path)
    try:
        # Files of torch before 1.6 are no archives and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ModelError(f"{path} is no file of tensors; save or download the adapter again") from error
        raise ModelError(asks_to_run_code(path, wanted[1])) from error
    except Exception as error:  # damaged files raise whatever their format's reader raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} cannot be read: {reason}; save or download the adapter again") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise ModelError(
            f"{path} holds something beside tensors by name; save the adapter with save_pretrained, which writes "
            "nothing else"
        )
    return loaded
