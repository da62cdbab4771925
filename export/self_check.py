"""Before a package is written, its programs must agree with torch on real text.

Each arithmetic is compared with torch on the same quantised weights. ``float`` must agree to ``STRICT_LIMIT``: it
differs by nothing but the order of additions. The int8 arithmetics also round activations (and ``row_int8`` rounds
the weights once more), which is reported; one whose jvps no longer point the same way (``COSINE_LIMIT``) is not
offered.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edge_runtime.data import Batch, Row, Tokenizer, make_batch
from edge_runtime.engine_choice import engine_maker
from edge_runtime.engines import Engine
from edge_runtime.errors import ModelError
from edge_runtime.executor import Executor, Sweep
from edge_runtime.messages import LocalOptimizer, Task
from edge_runtime.package import Arithmetic, EngineName, Package, SelfCheck
from edge_runtime.preparation import prepare
from edge_runtime.prepared import PreparedPackage
from edge_runtime.slices import Values, key
from edge_runtime.tangents import draw_tangents
from export.reference import TorchReference

STRICT_LIMIT = 1e-3
COSINE_LIMIT = 0.9
CHECK_DRAWS = 4
CHECK_ROWS = 16
#: Slices are moved off their initial zeros, so that every path carries signal.
PERTURBATION = 0.02


def check_package(
    package: Package,
    reference: TorchReference,
    texts: tuple[str, ...],
    engine_name: EngineName = "onnxruntime",
) -> dict[Arithmetic, SelfCheck]:
    """Compare loss and jvp of a package's programs with torch, in every arithmetic it offers on an engine.

    Raises:
        ModelError: in float arithmetic they disagree beyond the limit; the message gives the differences.
    """
    package = package.for_engine(engine_name)
    manifest = package.manifest
    rows = [Row(text, i % len(manifest.labels)) for i, text in enumerate(texts[:CHECK_ROWS])]
    ids = Tokenizer(package.path(manifest.tokenizer), manifest.sequence_limit).encode(rows)
    batch = make_batch(ids, [row.label for row in rows], pad_token_id=manifest.pad_token_id)
    values = _perturbed(reference)
    trained = [spec for spec in manifest.slices if spec.kind != "head"]
    tangents = draw_tangents(_check_task(), trained, 0, range(len(rows)))
    expected_loss, expected_jvps = _expected(reference, values, batch, tangents)

    checks: dict[Arithmetic, SelfCheck] = {}
    engine = engine_maker(engine_name)(torch.get_num_threads())
    for arithmetic in manifest.arithmetics:
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare(package, Path(folder) / "prepared", engine, arithmetic)
            sweep = _sweep(prepared, engine, values, batch, tangents)
        checks[arithmetic] = SelfCheck(
            rows=len(rows),
            loss=_difference(sweep.loss, expected_loss),
            jvp=_difference(_jvps(sweep), expected_jvps),
            jvp_cosine=_cosine(_jvps(sweep), expected_jvps),
        )
    strict = checks["float"]
    if not (strict.loss < STRICT_LIMIT and strict.jvp < STRICT_LIMIT):
        raise ModelError(
            f"the programs for {engine_name} disagree with torch: loss by {strict.loss:.1e}, jvp by {strict.jvp:.1e}, "
            f"limit {STRICT_LIMIT:.0e}; nothing was written. Please report the model's architecture"
        )
    return checks


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


def _sweep(
    prepared: PreparedPackage, engine: Engine, values: dict[str, Tensor], batch: Batch, tangents: Values
) -> Sweep:
    trained = [spec.name for spec in prepared.manifest.slices if spec.kind != "head"]
    bounds = [v.bounds.get("batch") for p in prepared.manifest.programs.values() for v in p.variants.values()]
    size = min((bound for bound in bounds if bound), default=len(batch.labels))
    groups = [slice(start, start + size) for start in range(0, len(batch.labels), size)]
    batches = [Batch(batch.input_ids[g], batch.attention_mask[g], batch.labels[g]) for g in groups]
    directions = [{name: tangent[:, g] for name, tangent in tangents.items()} for g in groups]
    return Executor(prepared, engine, trained).sweep(flat_values(values), batches, directions)


def _jvps(sweep: Sweep) -> np.ndarray:
    if sweep.jvps is None:
        raise ModelError("the dual programs gave no directional derivative; nothing was written")
    return sweep.jvps


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def _cosine(got: np.ndarray, expected: np.ndarray) -> float:
    return float((got * expected).sum() / (np.linalg.norm(got) * np.linalg.norm(expected)))
