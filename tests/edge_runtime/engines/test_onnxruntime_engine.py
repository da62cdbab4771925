from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from edge_runtime.engines.names import OUTPUT_SUFFIX
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import PackageError, WorkerError

WEIGHT = np.array([[1, 2], [3, 4]], dtype=np.float32)


@pytest.fixture
def program(tmp_path):
    """y = x · w and s = x + x, w external and without data."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "bound-by-the-runtime"), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    outputs = [f"y{OUTPUT_SUFFIX}", f"s{OUTPUT_SUFFIX}"]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], outputs[:1]),
            helper.make_node("Add", ["x", "x"], outputs[1:]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in outputs],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "program.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_a_program_runs_on_bound_weights(program, threads: int) -> None:
    """Weights bound at loading are used, and outputs come back by their plain names, those asked for only."""
    x = np.array([[1, 0], [1, 1], [0, 2]], dtype=np.float32)
    got = OnnxEngine(threads).load(program, {"w": WEIGHT}, ["y"]).run({"x": x})
    assert list(got) == ["y"]
    np.testing.assert_allclose(got["y"], x @ WEIGHT)


def test_a_program_keeps_its_weights_alive(program) -> None:
    """The caller may forget the arrays it bound."""
    loaded = OnnxEngine().load(program, {"w": WEIGHT.copy()}, ["y", "s"])
    gc.collect()
    np.testing.assert_allclose(loaded.run({"x": np.eye(2, dtype=np.float32)})["y"], WEIGHT)


@pytest.mark.parametrize(
    "weights", [{"w": np.zeros((3, 3), np.float32)}, {"w": np.zeros((2, 2), np.int64)}, {}]
)
def test_weights_that_do_not_fit_are_package_errors(program, weights) -> None:
    """Weights of another shape or type, or none, are a PackageError that names engine and program."""
    with pytest.raises(PackageError, match=r"onnxruntime .* cannot load .*program\.onnx"):
        OnnxEngine().load(program, weights, ["y"])


@pytest.mark.parametrize("data", [b"", b"not a graph", bytes(100)])
def test_a_file_that_is_no_program_is_a_package_error(tmp_path, data: bytes) -> None:
    """Bytes that are no ONNX graph are a PackageError."""
    (tmp_path / "p.onnx").write_bytes(data)
    with pytest.raises(PackageError, match="cannot load"):
        OnnxEngine().load(tmp_path / "p.onnx", {}, ["y"])


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"x": np.zeros((1, 3), np.float32)},
        {"x": np.zeros((1, 2), np.float64)},
        {"z": np.zeros((1, 2), np.float32)},
    ],
    ids=["missing", "shape", "type", "unknown"],
)
def test_inputs_that_do_not_fit_are_worker_errors(program, inputs) -> None:
    """A run on wrong inputs is a WorkerError with the engine's reason."""
    with pytest.raises(WorkerError, match="onnxruntime failed"):
        OnnxEngine().load(program, {"w": WEIGHT}, ["y"]).run(inputs)


def test_the_engine_reports_to_nobody(tmp_path: Path) -> None:
    """Loading the engine leaves no identifier and no reports to be sent, as its makers' builds would by themselves."""
    program = "from edge_runtime.engines.onnxruntime_engine import OnnxEngine; OnnxEngine()"
    # What marks a test system would keep the engine quiet in any case.
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    folders = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env={**kept, **folders})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
