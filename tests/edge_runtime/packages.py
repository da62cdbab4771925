"""A package small enough to read: one program, one weight, one LoRA-XS slice, a head. It cannot be run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from edge_runtime.engines.choice import engine_version
from edge_runtime.package.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SIGNATURE,
    Base,
    FileEntry,
    Manifest,
    Program,
    Segment,
    SelfCheck,
    SliceSpec,
    TensorRef,
    TensorSpec,
    Variant,
)
from edge_runtime.package.prepared import (
    PREPARED,
    PREPARED_VERSION,
    Calibration,
    Prepared,
    PreparedSegment,
    cpu_type,
)
from edge_runtime.protocol.signing import PrivateKey

FILES = {
    "programs/block.onnx": b"a graph",
    "programs/probe.onnx": b"another graph",
    "weights/block.bin": bytes(64),
    "tokenizer.json": b"{}",
    "slices.safetensors": b"initial values",
}


def make_manifest(files: dict[str, bytes] | None = None) -> Manifest:
    """The manifest of the little package, listing ``files`` with size and sha256."""
    files = FILES if files is None else files
    weights = {"weight": TensorRef("weights/block.bin", 0, "float32", (4, 4))}
    return Manifest(
        format_version=FORMAT_VERSION,
        name="little",
        task="classification",
        labels=("negative", "positive"),
        sequence_limit=64,
        pad_token_id=0,
        base=Base("LittleModel", "tests", 16, 4, "none"),
        files={name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
        programs={
            "block": Program(("hidden",), ("hidden",), {"float": Variant("programs/block.onnx", ("weight",))})
        },
        segments=(
            Segment("block0", "block", "block", "block", weights),
            Segment("head", "block", None, None, weights),
        ),
        slices=(
            SliceSpec("block0.query", "lora_xs", (0,), "query", (TensorSpec("core", (2, 2), "core"),)),
            SliceSpec("head", "head", (1,), "classifier", (TensorSpec("weight", (2, 4), "head"),)),
        ),
        tokenizer="tokenizer.json",
        initial_state="slices.safetensors",
        self_checks={"float": SelfCheck(1, 0.0, 0.0, 1.0)},
        probe="programs/probe.onnx",
    )


def write_package(folder: Path, publisher: PrivateKey, manifest: Manifest | None = None) -> Path:
    """Write the little package, signed by ``publisher``, into ``folder``."""
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    data = msgspec.json.encode(make_manifest() if manifest is None else manifest)
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_text(publisher.sign(data))
    return folder


def write_prepared(folder: Path, package_sha256: str, **changes: object) -> Path:
    """The little package as prepared for this machine, in ``folder``; its weights stay in the package."""
    prepared = Prepared(
        version=PREPARED_VERSION,
        package_sha256=package_sha256,
        engine=engine_version("onnxruntime"),
        cpu=cpu_type(),
        arithmetic="float",
        weight_limit=127,
        candidates=(),
        calibration=Calibration(1, 1, 1.0, 2.0, 5.0),
        segments=tuple(PreparedSegment(True, segment.weights) for segment in make_manifest().segments),
        files={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PREPARED).write_bytes(msgspec.json.encode(msgspec.structs.replace(prepared, **changes)))
    return folder
