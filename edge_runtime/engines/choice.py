"""Engines by name: the one place that makes them, which of them are installed, and with how many threads.

An engine's library is imported only when the engine is asked for, so that a device loads only its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_runtime.engines.names import EngineName
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from edge_runtime.engines.engine import Engine


def engine_maker(name: EngineName) -> Callable[[int], Engine]:
    """Import an engine's library.

    Returns:
        A function that makes the engine for a number of threads.

    Raises:
        ConfigError: the library is not installed; gives the install command.
    """
    if name == "executorch":
        from edge_runtime.engines.executorch_engine import ExecutorchEngine, load_library  # noqa: PLC0415 - where asked for

        load_library()
        return ExecutorchEngine
    from edge_runtime.engines.onnxruntime_engine import OnnxEngine  # noqa: PLC0415 - the other engine does without

    return OnnxEngine


def threads_or_all(threads: int = 0) -> int:
    """Threads for an engine: as many as were chosen; for 0 as many as there are cores this process may use."""
    return threads or len(os.sched_getaffinity(0))


def engine_version(name: EngineName) -> str:
    """Name and version of an installed engine, found without loading it.

    Raises:
        ConfigError: it is not installed; gives the install command.
    """
    from importlib import metadata  # noqa: PLC0415 - 1.5 MB, which the training process does without

    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError as error:
        extra = "" if name == "onnxruntime" else f"[{name}]"
        raise ConfigError(
            f"engine {name} is not installed; install it: pip install 'edge-runtime{extra}'"
        ) from error
