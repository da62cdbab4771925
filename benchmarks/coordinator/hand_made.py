"""A hand-made package whose programs nobody runs, and a run of it, for tests and benchmarks of the coordinator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.package.manifest import (
    FORMAT_VERSION,
    Base,
    FileEntry,
    Manifest,
    Program,
    Segment,
    SelfCheck,
    SizeTerm,
    SliceSpec,
    TensorSpec,
    Variant,
)
from edge_runtime.package.slices import encode_values, shapes
from edge_runtime.protocol import messages
from edge_runtime.protocol.signing import PrivateKey

#: Keys of run.toml, without package and publisher.
RUN: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "rounds": 2,
    "devices_per_round": 2,
    "split": "cyclic",
    "min_devices": 2,
    "min_results": 1,
    "steps": 3,
    "batch_size": 4,
    "selection_timeout_s": 10.0,
    "deadline_s": 60.0,
    "poll_min_s": 0.3,
    "poll_max_s": 0.6,
    "max_abandoned": 2,
}


def slice_spec(name: str, segment: int, shape: tuple[int, ...], kind: str = "lora_xs") -> SliceSpec:
    """A slice with one tensor named ``core``."""
    tensors = (TensorSpec("core", shape, f"{name}.core"),)
    return SliceSpec(name, kind, (segment,), f"target.{name}", tensors)  # type: ignore[arg-type]


def initial_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, but ones for s1 and random numbers for an A."""
    if name.endswith("/A"):
        return np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return np.full(shape, name == "s1/core", np.float32)


def write_package(
    folder: Path,
    key: PrivateKey,
    specs: tuple[SliceSpec, ...],
    more: Mapping[str, bytes] | None = None,
    labels: tuple[str, ...] = ("no", "yes"),
) -> Path:
    """Write a signed package whose programs are dummies: the coordinator never runs them itself.

    Args:
        folder: folder to make.
        key: the publisher's key.
        specs: all slices, the head among them.
        more: further files of the package, by name, or others in the place of its own.
        labels: the package's labels.
    """
    folder.mkdir()
    initial = {name: initial_value(name, shape) for name, shape in shapes(specs).items()}
    files = {
        "programs.onnx": b"dummy program" * 100,
        "probe.onnx": b"another dummy",
        "tokenizer.json": b"{}",
        "slices.safetensors": encode_values(initial),
        **(more or {}),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    variant = Variant("programs.onnx", (), live=((SizeTerm(64.0, 1, 1, 0),),))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        task="classification",
        labels=labels,
        sequence_limit=16,
        pad_token_id=0,
        base=Base("bert", "by hand", 100, 4, "none"),
        files={name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
        programs={"p": Program(("hidden",), ("hidden",), {"float": variant})},
        segments=(Segment("embed", "p", "p", "p", {}), Segment("head", "p", "p", "p", {})),
        slices=specs,
        tokenizer="tokenizer.json",
        initial_state="slices.safetensors",
        self_checks={"float": SelfCheck(1, 0.0, 0.0, 1.0)},
        probe="probe.onnx",
    )
    data = messages.encode(manifest)
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_text(key.sign(data))
    return folder
