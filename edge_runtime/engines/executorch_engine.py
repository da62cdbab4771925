"""ExecuTorch as the engine: ``.pte`` programs with XNNPACK, through its Python binding.

The binding takes torch tensors, so this engine loads torch, 218 MB resident, when it is made and not before. The
binding is imported by its own name, ``_portable_lib``: the public ``executorch.runtime`` imports the whole exporter as
well, 135 MB more (docs/decisions/0013-executorch.md).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from edge_runtime.engines.engine import Array
from edge_runtime.engines.names import INPUTS_METHOD, NAME_SEPARATOR, OUTPUTS_METHOD
from edge_runtime.errors import ConfigError, FormatVersionError, PackageError, WorkerError

#: Format of a ``.pte`` in its bytes 4 to 8; this engine reads one version of it.
PROGRAM_FORMAT = b"ET12"
INSTALL = "pip install 'edge-runtime[executorch]'"


@cache
def load_library() -> tuple[Any, Any]:
    """Import torch and ExecuTorch's binding.

    Raises:
        ConfigError: one of them is not installed; gives the install command.
    """
    try:
        torch = importlib.import_module("torch")
        return torch, importlib.import_module("executorch.extension.pybindings._portable_lib")
    except ImportError as error:
        raise ConfigError(f"engine executorch cannot be loaded ({error}); install it: {INSTALL}") from error


class ExecutorchEngine:
    """Loads ``.pte`` programs for the CPU.

    Args:
        threads: number of threads of the process's one pool.

    Raises:
        ConfigError: ExecuTorch or torch is not installed; gives the install command.
    """

    def __init__(self, threads: int = 1) -> None:
        self._torch, self._binding = load_library()
        self._binding._unsafe_reset_threadpool(threads)

    @property
    def version(self) -> str:
        """Name and version, as :func:`edge_runtime.engines.choice.engine_version` gives them."""
        return f"executorch {metadata.version('executorch')}"

    def load(self, program: Path, weights: Mapping[str, Array], outputs: Sequence[str]) -> ExecutorchProgram:
        """See :meth:`edge_runtime.engines.engine.Engine.load`. No weights are bound: all are inputs.

        Raises:
            FormatVersionError: the program was made for another version of ExecuTorch.
            PackageError: the file is no program, or the program does not have the outputs.
        """
        if weights:
            raise PackageError(f"{program} has weights to bind; {self.version} takes them as inputs")
        self._check_format(program)
        try:
            loaded = self._binding._load_program(
                str(program), program_verification=self._binding.Verification.InternalConsistency
            )
            inputs, made = (
                tuple(loaded.load_method(name)([])[0].split(NAME_SEPARATOR))
                for name in (INPUTS_METHOD, OUTPUTS_METHOD)
            )
            method = loaded.load_method("forward")
        except Exception as error:  # the binding's exceptions have no narrower root
            raise PackageError(
                f"{self.version} cannot load {program}: {_reason(error)}; export it again"
            ) from error
        missing = [name for name in outputs if name not in made]
        if missing:
            raise PackageError(f"{program} gives no {missing[0]!r}; export it again")
        return ExecutorchProgram(self._torch, loaded, method, inputs, made, outputs)

    def _check_format(self, program: Path) -> None:
        try:
            with program.open("rb") as file:
                found = file.read(8)[4:]
        except OSError as error:
            raise PackageError(f"cannot read {program}: {error.strerror}; fetch the package again") from error
        if found == PROGRAM_FORMAT:
            return
        if found[:2] == PROGRAM_FORMAT[:2] and found[2:].isdigit():
            raise FormatVersionError(
                f"{program} has program format {found.decode()}, {self.version} reads "
                f"{PROGRAM_FORMAT.decode()}; export it again with that version"
            )
        raise PackageError(f"{program} is no ExecuTorch program; fetch or export the package again")


class ExecutorchProgram:
    """One method with the memory planned for it. It keeps its program alive."""

    def __init__(
        self,
        torch: Any,
        program: Any,
        method: Any,
        inputs: Sequence[str],
        made: Sequence[str],
        outputs: Sequence[str],
    ) -> None:
        self._torch, self._program, self._method = torch, program, method
        self._inputs = inputs
        self._places = {name: made.index(name) for name in outputs}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See :meth:`edge_runtime.engines.engine.LoadedProgram.run`.

        Inputs are read where they lie; outputs are copied.
        """
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise WorkerError(f"executorch failed: the program wants {missing[0]!r}, which was not given")
        with warnings.catch_warnings():
            # torch warns that a mapped weight cannot be written to; nothing writes.
            warnings.simplefilter("ignore")
            tensors = [self._torch.from_numpy(inputs[name]).contiguous() for name in self._inputs]
        try:
            results = self._method(tensors)
        except Exception as error:  # the binding's exceptions have no narrower root
            raise WorkerError(
                f"executorch failed: {_reason(error)}; its own log on standard error tells more"
            ) from error
        return {name: results[place].numpy() for name, place in self._places.items()}


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
