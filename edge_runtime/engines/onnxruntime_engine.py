"""ONNX Runtime as the engine.

Each option was measured (docs/decisions/0003-engine.md, 0011-live-sets.md):

- All sessions share one arena. Segments run one after another, and arenas of their own would each keep their peak.
- Spinning is off, because several sessions share the process.
- Weights that the engine repacks are bound as external initialisers. All others are inputs, whose mapped pages the
  engine reads in place.
- Nodes run in the order of the file, which the exporter chose for memory. Fusions are off because they change that
  order, planned reuse because it keeps dead buffers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

# Said before it is loaded: its makers' builds send them reports of what runs, under an identifier kept on the disk.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

from edge_runtime.engines.engine import Array
from edge_runtime.engines.names import OUTPUT_SUFFIX
from edge_runtime.errors import PackageError, WorkerError


@cache
def _share_one_arena() -> None:
    """Register one arena for all sessions of this process. It has no configuration: with one it crashes."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


class OnnxEngine:
    """Loads ``.onnx`` programs for the CPU.

    Args:
        threads: number of threads that one operator may use.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        _share_one_arena()

    @property
    def version(self) -> str:
        """Name and version, as :func:`edge_runtime.engines.choice.engine_version` gives them."""
        return f"onnxruntime {ort.__version__}"

    def load(self, program: Path, weights: Mapping[str, Array], outputs: Sequence[str]) -> OnnxProgram:
        """See :meth:`edge_runtime.engines.engine.Engine.load`."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.enable_mem_reuse = False
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        bound = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
        options.add_external_initializers(list(bound), list(bound.values()))
        try:
            session = ort.InferenceSession(str(program), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's exceptions have no narrower root
            reason = str(error).splitlines()[0]
            raise PackageError(f"onnxruntime {ort.__version__} cannot load {program}: {reason}") from error
        return OnnxProgram(session, outputs, bound)


class OnnxProgram:
    """One session. It keeps its bound weights alive."""

    def __init__(
        self, session: ort.InferenceSession, outputs: Sequence[str], bound: Mapping[str, ort.OrtValue]
    ) -> None:
        self._session = session
        self._outputs = list(outputs)
        self._bound = bound

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See :meth:`edge_runtime.engines.engine.LoadedProgram.run`."""
        try:
            results = self._session.run([name + OUTPUT_SUFFIX for name in self._outputs], dict(inputs))
        except Exception as error:  # the library's exceptions have no narrower root
            raise WorkerError(f"onnxruntime failed: {str(error).splitlines()[0]}") from error
        # Copied, so that nothing of this run stays in the arena: results there would lie in the way of the next run.
        return {name: result.copy() for name, result in zip(self._outputs, results, strict=True)}
