"""An engine that loads each program once, however many executors ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_runtime.engines.engine import Array, Engine, LoadedProgram


class KeptPrograms:
    """Wraps an engine. Programs that carry weights of their own are another for each segment, and loaded anew."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loaded: dict[tuple[Path, tuple[str, ...]], LoadedProgram] = {}

    @property
    def version(self) -> str:
        """See :class:`edge_runtime.engines.engine.Engine`."""
        return self._engine.version

    def load(self, program: Path, weights: Mapping[str, Array], outputs: Sequence[str]) -> LoadedProgram:
        """See :class:`edge_runtime.engines.engine.Engine`."""
        if weights:
            return self._engine.load(program, weights, outputs)
        known = (program, tuple(outputs))
        if known not in self._loaded:
            self._loaded[known] = self._engine.load(program, weights, outputs)
        return self._loaded[known]
