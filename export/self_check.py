"""Before a package is written, its programs must agree with torch on real text.

Two comparisons on the same quantised weights: *strict*, with the programs' matrix products in float32, must
agree to ``STRICT_LIMIT``; *as shipped*, with int8 arithmetic, adds the rounding of activations, which is
reported and must leave the directional derivatives pointing the same way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edge_runtime.data import Batch, Row, Tokenizer, make_batch
from edge_runtime.engines.onnx import OnnxEngine
from edge_runtime.errors import ModelError
from edge_runtime.executor import Executor, Sweep
from edge_runtime.messages import LocalOptimizer, Task
from edge_runtime.package import Package, SelfCheck
from edge_runtime.slices import Values, key
from edge_runtime.tangents import draw_tangents
from export.reference import TorchReference

STRICT_LIMIT = 1e-3
COSINE_LIMIT = 0.9
CHECK_DRAWS = 4
CHECK_ROWS = 16
FLOAT_ARITHMETIC = 1
#: Slices are moved off their initial zeros, so that every path carries signal.
PERTURBATION = 0.02


def check_package(package: Package, reference: TorchReference, texts: tuple[str, ...]) -> SelfCheck:
    """Compare loss and jvp of a package's programs with torch.

    Raises:
        ModelError: they disagree beyond the limits; the message gives the differences.
    """
    manifest = package.manifest
    rows = [Row(text, i % len(manifest.labels)) for i, text in enumerate(texts[:CHECK_ROWS])]
    ids = Tokenizer(package.path(manifest.tokenizer), manifest.sequence_limit).encode(rows)
    batch = make_batch(ids, [row.label for row in rows], pad_token_id=manifest.pad_token_id)
    values = _perturbed(reference)
    trained = [spec for spec in manifest.slices if spec.kind != "head"]
    tangents = draw_tangents(_check_task(), trained, 0, range(len(rows)))

    expected_loss, expected_jvps = _expected(reference, values, batch, tangents)
    with tempfile.TemporaryDirectory() as folder:
        strict = _sweep(_with_float_arithmetic(package, Path(folder)), values, batch, tangents)
    shipped = _sweep(package, values, batch, tangents)
    result = SelfCheck(
        rows=len(rows),
        strict_loss=_difference(strict.loss, expected_loss),
        strict_jvp=_difference(_jvps(strict), expected_jvps),
        loss=_difference(shipped.loss, expected_loss),
        jvp=_difference(_jvps(shipped), expected_jvps),
        jvp_cosine=_cosine(_jvps(shipped), expected_jvps),
    )
    if not (result.strict_loss < STRICT_LIMIT and result.strict_jvp < STRICT_LIMIT):
        raise ModelError(
            f"the programs disagree with torch: loss by {result.strict_loss:.1e}, jvp by {result.strict_jvp:.1e}, "
            f"limit {STRICT_LIMIT:.0e}; nothing was written. Please report the model's architecture"
        )
    if not result.jvp_cosine > COSINE_LIMIT:
        raise ModelError(
            f"with int8 arithmetic the jvps keep a cosine of only {result.jvp_cosine:.2f} to torch's "
            f"(limit {COSINE_LIMIT}); nothing was written. Export with --quant none"
        )
    return result


def _check_task() -> Task:
    return Task(
        task_id="self-check",
        run_id="self-check",
        round=0,
        slot=0,
        seed=0,
        package="0" * 64,
        package_signature="A" * 86 + "==",
        state="0" * 64,
        slices=(),
        train_head=False,
        steps=1,
        batch_size=CHECK_ROWS,
        draws=CHECK_DRAWS,
        sequence_limit=1,
        optimizer=LocalOptimizer(),
        required_bytes=0,
        deadline_s=0,
    )


def _perturbed(reference: TorchReference) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: reference.tensors[name]
        + PERTURBATION * torch.randn(reference.tensors[name].shape, generator=generator)
        for name in reference.trainable
    }


def flat_values(slices: dict[str, Tensor]) -> Values:
    """Trainable tensors of a classifier under the names packages use."""
    return {
        key(name.removeprefix("encoder.").rsplit(".", 1)[0], name.rsplit(".", 1)[1]): value.detach().numpy()
        for name, value in slices.items()
    }


def torch_inputs(batch: Batch) -> dict[str, Tensor]:
    """A batch as the reference takes it."""
    return {
        "input_ids": torch.from_numpy(batch.input_ids),
        "attention_mask": torch.from_numpy(batch.attention_mask),
        "labels": torch.from_numpy(batch.labels),
    }


def _expected(
    reference: TorchReference, slices: dict[str, Tensor], batch: Batch, tangents: Values
) -> tuple[np.ndarray, np.ndarray]:
    loss, gradients = reference.example_gradients(torch_inputs(batch), slices)
    jvps = sum(
        (gradient * tangents[name]).reshape(*tangents[name].shape[:2], -1).sum(-1)
        for name, gradient in flat_values(gradients).items()
    )
    return loss.numpy(), np.asarray(jvps)


def _sweep(package: Package, values: dict[str, Tensor], batch: Batch, tangents: Values) -> Sweep:
    trained = [spec.name for spec in package.manifest.slices if spec.kind != "head"]
    executor = Executor(package, OnnxEngine(threads=torch.get_num_threads()), trained)
    return executor.sweep(flat_values(values), [batch], [tangents])


def _with_float_arithmetic(package: Package, folder: Path) -> Package:
    """The same package, its quantised products computed in float32."""
    (folder / "programs").mkdir()
    (folder / "weights").symlink_to((package.folder / "weights").resolve())
    for program in package.manifest.programs.values():
        model = ir.load(package.folder / program.file)
        for node in model.graph:
            if "accuracy_level" in node.attributes:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FLOAT_ARITHMETIC)
        ir.save(model, folder / program.file)
    return Package(folder, package.manifest, package.sha256)


def _jvps(sweep: Sweep) -> np.ndarray:
    if sweep.jvps is None:
        raise ModelError("the dual programs gave no directional derivative; nothing was written")
    return sweep.jvps


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def _cosine(got: np.ndarray, expected: np.ndarray) -> float:
    return float((got * expected).sum() / (np.linalg.norm(got) * np.linalg.norm(expected)))
