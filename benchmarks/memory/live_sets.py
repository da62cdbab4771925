"""Compare a lowered program's predicted live set with what ONNX Runtime takes, each run in a fresh process.

    python -m benchmarks.memory.live_sets package/programs/block_0.dual.onnx --sizes 1x128x1 1x128x4

Sizes are batch x sequence x draws; weights and inputs are ones. The columns, in MB:

* *predicted*: the predicted live set;
* *exact*: growth of the resident peak with every tensor in a mapping of its own;
* *arena*: growth over the first run at that size in the worker's shared arena, and after five more. The arena uses
  some memory again that loading freed, so its growth may be below the live set.

It needs Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from export.lowering.live_sets import evaluate, live_sets
from export.lowering.trace import BATCH, DRAWS, SEQUENCE

#: Numbers of two options of mallopt(3), and the size above which tensors get a mapping of their own, in bytes.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _OWN_MAPPING_BYTES = -3, -1, 1 << 14
_WARM_SIZE = {BATCH: 1, SEQUENCE: 2, DRAWS: 1}
_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(int64)": np.int64}


def main() -> int:
    """Print one row for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("program", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["1x128x1", "1x128x4"], metavar="BxTxK")
    parser.add_argument(
        "--engine-default", action="store_true", help="the engine's own order, fusions and reuse"
    )
    parser.add_argument("--measure", choices=("exact", "arena"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        size = _size(arguments.sizes[0])
        print(json.dumps(_measure(arguments.program, size, arguments.measure, arguments.engine_default)))
        return 0
    print("| batch, tokens, draws | predicted | exact | arena, first run | after five more | ms |")
    print("|---|---|---|---|---|---|")
    for text in arguments.sizes:
        predicted = _predict(arguments.program, _size(text))
        exact, arena = (_in_fresh_process(arguments, text, kind) for kind in ("exact", "arena"))
        cells = (predicted / 1e6, exact["peak"], arena["first"], arena["later"], arena["ms"])
        print(
            f"| {text.replace('x', ', ')} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True
        )
    return 0


def _size(text: str) -> dict[str, int]:
    return dict(zip((BATCH, SEQUENCE, DRAWS), map(int, text.split("x")), strict=True))


def _predict(program: Path, size: dict[str, int]) -> float:
    return max(
        evaluate(
            {(t.batch_power, t.sequence_power, t.draws_power): t.coefficient for t in polynomial},
            *size.values(),
        )
        for polynomial in live_sets(ir.load(program))
    )


def _in_fresh_process(arguments: argparse.Namespace, size: str, kind: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory.live_sets", str(arguments.program)]
    command += ["--sizes", size, "--measure", kind, *(["--engine-default"] * arguments.engine_default)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(result.stdout)
    return measured


def _measure(program: Path, size: dict[str, int], kind: str, engine_default: bool) -> dict[str, float]:
    """Growth of memory in MB, and the smallest time of a run in milliseconds.

    Args:
        program: ONNX program to run.
        size: batch, sequence and draws.
        kind: ``exact`` gives every tensor a mapping of its own; ``arena`` uses the worker's shared arena.
        engine_default: whether the engine keeps its own order, fusions and reuse of memory.
    """
    if kind == "exact":
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, _OWN_MAPPING_BYTES)
    session = _session(program, kind, engine_default)
    session.run(None, _feed(session, _WARM_SIZE))
    feed = _feed(session, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before, peak_before = _status("RssAnon"), _status("VmRSS")
    kept = session.run(None, feed)
    first, peak = _status("RssAnon"), _status("VmHWM")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        kept = session.run(None, feed)
        times.append(time.perf_counter() - started)
    later = _status("RssAnon")
    del kept
    return {
        "peak": (peak - peak_before) / 1e6,
        "first": (first - before) / 1e6,
        "later": (later - before) / 1e6,
        "ms": min(times) * 1e3,
    }


def _session(program: Path, kind: str, engine_default: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    if not engine_default:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.enable_mem_reuse = False
    if kind == "exact":
        options.enable_cpu_mem_arena = False
    else:
        memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(memory, None)
        options.add_session_config_entry("session.use_env_allocators", "1")
    bound = {
        tensor.name: ort.OrtValue.ortvalue_from_numpy(
            np.ones(tensor.dims, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        )
        for tensor in onnx.load(program, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    if bound:
        options.add_external_initializers(list(bound), list(bound.values()))
    session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    session._bound = bound  # the engine does not copy them
    return session


def _feed(session: ort.InferenceSession, size: dict[str, int]) -> dict[str, Any]:
    return {
        each.name: np.ones([size.get(side, side) for side in each.shape], _TYPES[each.type])
        for each in session.get_inputs()
    }


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    sys.exit(main())
