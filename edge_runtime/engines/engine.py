"""The interface of an inference engine: load a program together with its weights, run it on named arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]


class LoadedProgram(Protocol):
    """A program with its weights in place."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the program once.

        Args:
            inputs: arrays by input name.

        Returns:
            Arrays by output name.

        Raises:
            WorkerError: the engine fails.
        """
        ...


class Engine(Protocol):
    """Loads programs."""

    @property
    def version(self) -> str:
        """Name and version. Weights prepared for one version are not used with another."""
        ...

    def load(self, program: Path, weights: Mapping[str, Array], outputs: Sequence[str]) -> LoadedProgram:
        """Load one program.

        Args:
            program: path of its file.
            weights: frozen tensors to bind, by initialiser name; the engine may keep references to them.
            outputs: names of the outputs to compute.

        Raises:
            PackageError: the engine cannot load the program.
        """
        ...
