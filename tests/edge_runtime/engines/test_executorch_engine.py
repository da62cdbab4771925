"""The second engine: small programs lowered for real, and every way in which a program or its inputs do not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_runtime.engines.choice import engine_maker, engine_version
from edge_runtime.engines.executorch_engine import ExecutorchEngine
from edge_runtime.errors import ConfigError, FormatVersionError, PackageError, WorkerError
from export.lowering.executorch import LoweredProgram, lower_executorch
from export.lowering.trace import TracedProgram

MOST = 4
WEIGHT = np.array([[1, 2], [3, 4]], dtype=np.float32)
X = np.array([[1, 0], [1, 1], [0, 2]], dtype=np.float32)


class Product(torch.nn.Module):
    """y = x · w and s = x + x."""

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [x @ w, x + x]


@pytest.fixture(scope="module")
def lowered() -> LoweredProgram:
    """The product, for up to MOST rows."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(
        Product(), (torch.zeros(3, 2), torch.zeros(2, 2)), dynamic_shapes=({0: batch}, {})
    )
    traced = TracedProgram(exported, ("x", "w"), ("y", "s"), ("w",), {"x": {0: "batch"}})
    return lower_executorch(traced, {"draws": 1, "batch": MOST, "sequence": 8})


@pytest.fixture
def program(lowered: LoweredProgram, tmp_path: Path) -> Path:
    """The product as a file."""
    path = tmp_path / "program.pte"
    path.write_bytes(lowered.buffer)
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_a_program_runs_on_named_arrays(program: Path, threads: int) -> None:
    """Inputs and outputs go by name, and only outputs that were asked for come back."""
    got = ExecutorchEngine(threads).load(program, {}, ["y"]).run({"w": WEIGHT, "x": X})
    assert list(got) == ["y"]
    np.testing.assert_allclose(got["y"], X @ WEIGHT)


def test_results_outlive_the_next_run(program: Path) -> None:
    """Outputs are copies: a later run on other inputs leaves them as they were."""
    loaded = ExecutorchEngine().load(program, {}, ["y", "s"])
    first = loaded.run({"x": X, "w": WEIGHT})
    loaded.run({"x": X[:1] * 7, "w": WEIGHT})
    np.testing.assert_allclose(first["y"], X @ WEIGHT)
    np.testing.assert_allclose(first["s"], X + X)


def test_a_mapped_weight_is_read_where_it_lies(program: Path, tmp_path: Path) -> None:
    """A read-only mapped file serves as weight, without a warning and without a change."""
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    mapped = np.memmap(tmp_path / "w.bin", np.float32, "r", shape=(2, 2))
    got = ExecutorchEngine().load(program, {}, ["y"]).run({"x": X, "w": mapped})
    np.testing.assert_allclose(got["y"], X @ WEIGHT)
    assert (tmp_path / "w.bin").read_bytes() == WEIGHT.tobytes()


@pytest.mark.parametrize(
    "inputs",
    [
        {"w": WEIGHT},
        {"x": np.zeros((1, 3), np.float32), "w": WEIGHT},
        {"x": np.zeros((1, 2), np.float64), "w": WEIGHT},
        {"x": np.zeros((MOST + 1, 2), np.float32), "w": WEIGHT},
    ],
    ids=["missing", "shape", "type", "over the bound"],
)
def test_inputs_that_do_not_fit_are_worker_errors(program: Path, inputs) -> None:
    """A run on wrong inputs, or on more rows than memory was planned for, is a WorkerError with a reason."""
    with pytest.raises(WorkerError, match="executorch failed"):
        ExecutorchEngine().load(program, {}, ["y"]).run(inputs)


@pytest.mark.parametrize("data", [b"", b"not a program", bytes(100)])
def test_a_file_that_is_no_program_is_a_package_error(tmp_path: Path, data: bytes) -> None:
    """Bytes that are no ExecuTorch program are a PackageError that names the file."""
    (tmp_path / "p.pte").write_bytes(data)
    with pytest.raises(PackageError, match=r"p\.pte is no ExecuTorch program"):
        ExecutorchEngine().load(tmp_path / "p.pte", {}, ["y"])


def test_a_damaged_program_is_a_package_error(program: Path) -> None:
    """A program cut short is a PackageError that names the engine's version."""
    program.write_bytes(program.read_bytes()[:200])
    with pytest.raises(PackageError, match=r"executorch \d.* cannot load"):
        ExecutorchEngine().load(program, {}, ["y"])


def test_a_program_of_another_version_is_named_as_such(program: Path) -> None:
    """A program whose format this engine does not read is refused with both formats, in one line."""
    data = bytearray(program.read_bytes())
    assert data[4:8] == b"ET12"
    data[4:8] = b"ET13"
    program.write_bytes(data)
    with pytest.raises(
        FormatVersionError, match=r"has program format ET13, executorch .* reads ET12; export"
    ):
        ExecutorchEngine().load(program, {}, ["y"])


def test_what_a_program_does_not_give_or_take_is_a_package_error(program: Path) -> None:
    """An output the program has not, or a weight to bind, is refused when the program is loaded."""
    with pytest.raises(PackageError, match="gives no 'z'"):
        ExecutorchEngine().load(program, {}, ["z"])
    with pytest.raises(PackageError, match="takes them as inputs"):
        ExecutorchEngine().load(program, {"w": WEIGHT}, ["y"])


@pytest.mark.parametrize("missing", ["torch", "executorch.extension.pybindings._portable_lib"])
def test_an_engine_that_is_not_installed_says_how_to_get_it(missing: str) -> None:
    """Without torch or ExecuTorch, asking for the engine is one line with the install command."""
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from edge_runtime.engines.choice import engine_maker\n"
        "from edge_runtime.errors import ConfigError\n"
        "try:\n    engine_maker('executorch')\nexcept ConfigError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "pip install 'edge-runtime[executorch]'" in done.stdout


def test_the_version_of_an_engine_that_is_missing_says_how_to_get_it(monkeypatch) -> None:
    """Looking up the version of an engine that is not installed is the same ConfigError."""
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match=r"pip install 'edge-runtime\[executorch\]'"):
        engine_version("executorch")


@pytest.mark.parametrize("name", ["onnxruntime", "executorch"])
def test_an_engine_knows_its_version(name) -> None:
    """The engine made by name gives the version that is found without loading it."""
    assert engine_maker(name)(1).version == engine_version(name)


def test_the_first_engine_does_without_the_second() -> None:
    """Making ONNX Runtime's engine loads neither torch nor ExecuTorch."""
    script = (
        "import sys; from edge_runtime.engines.choice import engine_maker; engine_maker('onnxruntime')(1)\n"
        "assert not {'torch', 'executorch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_memory_is_planned_ahead_for_the_bounds(lowered: LoweredProgram) -> None:
    """The planned memory holds at least both outputs at the largest size."""
    assert lowered.planned_bytes >= 2 * MOST * 2 * 4
    assert lowered.inputs == ("x", "w")
    assert lowered.outputs == ("y", "s")


def test_what_is_not_delegated_is_listed_with_the_reason(lowered: LoweredProgram) -> None:
    """The product stays with ExecuTorch's kernel, since its weight is an input; the sum goes to XNNPACK."""
    listed = {operator: (count, reason) for operator, count, reason in lowered.undelegated}
    assert listed["aten.mm"][0] == 1
    assert "constant weights" in listed["aten.mm"][1]
    assert "aten.add.Tensor" not in listed
