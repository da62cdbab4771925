"""`make bench-placement`: where a block's weights can lie for the engine, and what each way costs.

Measured on the dual program of one BERT-base block, with one draw and 1 × 128 tokens. Each way runs in a fresh process,
which gives the seconds to load, the growth of anonymous and of file-backed memory by loading and running, and the
seconds of a run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.measured_process import pinned_to_cores, python_program, run_measured
from benchmarks.harness.result_file import RESULTS, figure, write_result
from benchmarks.harness.shapes import BERT_BASE
from benchmarks.harness.tables import table
from benchmarks.memory.subjects import TOKENS, Subject, make_subjects

RESULT = RESULTS / "weight-placement.json"
#: The ways by title: arithmetic of the program, and where its weights are.
WAYS = {
    "block_int8, bound and packed by each session": ("block_int8", "bound"),
    "block_int8, packed once and mapped": ("block_int8", "prepacked"),
    "block_int8, fed as inputs": ("block_int8", "fed"),
    "row_int8, bound and packed by each session": ("row_int8", "bound"),
    "row_int8, packed once and mapped": ("row_int8", "prepacked"),
    "row_int8, fed as inputs": ("row_int8", "fed"),
}
RUNS = 40


def main() -> int:
    """Measure every way in turns and write the table."""
    parser = bench_parser(__doc__.splitlines()[0], RESULT, repetitions=3)
    arguments = parser.parse_args()
    pinned_to_cores(arguments.threads)
    subject = make_subjects(arguments.folder, arguments.threads, (BERT_BASE.name,))[BERT_BASE.name]
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        for way, (arithmetic, place) in WAYS.items():
            model = _rewritten(subject, arithmetic, place, Path(temporary))
            turns = []
            for _ in range(arguments.repetitions):
                settings = {
                    "model": str(model),
                    "place": place,
                    "threads": arguments.threads,
                    "hidden": BERT_BASE.hidden,
                }
                command = python_program("benchmarks.kernels.weight_placement", "--child")
                turns.append(json.loads(run_measured([*command], json.dumps(settings).encode()).output))
            for what, unit in (
                ("load_s", "seconds"),
                ("anonymous", "bytes"),
                ("file", "bytes"),
                ("run_s", "seconds"),
            ):
                figures.append(
                    figure(f"{way}: {what.removesuffix('_s')}", unit, [turn[what] for turn in turns])
                )
    conditions = {"program": f"dual of a {BERT_BASE.name} block", "size": f"1 x {TOKENS}, 1 draw"}
    command = command_line("benchmarks.kernels.weight_placement", "bench-placement")
    document = write_result(arguments.output, command, arguments.threads, figures, conditions)
    print("\n" + table(document))
    return 0


def _rewritten(subject: Subject, arithmetic: str, place: str, folder: Path) -> Path:
    """The block's dual program with its weights as initialisers of an external file, packed or not, or as inputs.

    Weights that are fed as inputs lie in ``.npy`` files beside the program.
    """
    import onnx
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    from edge_runtime.execution.weights import MappedWeights
    from edge_runtime.package.package import Package
    from edge_runtime.package.prepared import PreparedPackage

    package = Package.open_known(subject.package, subject.sha256)
    prepared = PreparedPackage.open(package, subject.prepared(arithmetic), f"onnxruntime {ort.__version__}")
    program = subject.manifest.programs[str(subject.manifest.segments[1].dual)]
    variant = program.variants[arithmetic]
    weights = MappedWeights(prepared, 1).arrays
    model = onnx.load(package.path(variant.file), load_external_data=False)
    names = {*variant.fed, *variant.bound}
    inputs = [value for value in model.graph.input if value.name not in names]
    constants = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    del model.graph.input[:], model.graph.initializer[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(constants)
    path = folder / f"{arithmetic}-{place}.onnx"
    if place == "fed":
        for name in sorted(names):
            kind = helper.np_dtype_to_tensor_dtype(weights[name].dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, weights[name].shape))
        onnx.save(model, path)
        for name in names:
            np.save(folder / f"{path.stem}-{name}.npy", weights[name])
        return path
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(weights[name]), name) for name in names
    )
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=1024)
    if place == "prepacked":
        options = _options(1)
        options.optimized_model_filepath = str(folder / f"{path.stem}-packed.onnx")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{path.stem}-packed.bin"
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return folder / f"{path.stem}-packed.onnx"
    return path


def _options(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def child() -> None:
    """Load one program, run it, and write what that took."""
    import onnxruntime as ort

    from edge_runtime.memory.allocator import keep_freed_memory
    from edge_runtime.memory.meter import status_bytes

    keep_freed_memory()
    settings = json.load(sys.stdin)
    path = Path(settings["model"])
    # A first session sets up what all share.
    first = np.zeros(1, np.float32)
    ort.InferenceSession(_identity(), _options(settings["threads"]), providers=["CPUExecutionProvider"]).run(
        None, {"x": first}
    )
    anonymous, file = status_bytes("RssAnon"), status_bytes("RssFile")
    started = time.perf_counter()
    session = ort.InferenceSession(
        str(path), _options(settings["threads"]), providers=["CPUExecutionProvider"]
    )
    load_s = time.perf_counter() - started
    generator = np.random.default_rng(0)
    sizes = {"batch": 1, "sequence": TOKENS, "draws": 1}
    feeds = {}
    for value in session.get_inputs():
        stored = path.with_name(f"{path.stem}-{value.name}.npy")
        if stored.exists():
            feeds[value.name] = np.load(stored, mmap_mode="r")
            continue
        shape = [side if isinstance(side, int) else sizes.get(side, 1) for side in value.shape]
        feeds[value.name] = generator.standard_normal(shape, dtype=np.float32)
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - started)
    grown = {"anonymous": status_bytes("RssAnon") - anonymous, "file": status_bytes("RssFile") - file}
    json.dump({"load_s": load_s, "run_s": median(seconds), **grown}, sys.stdout)


def _identity() -> bytes:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [value], [other])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return bytes(model.SerializeToString())


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        child()
    else:
        sys.exit(main())
