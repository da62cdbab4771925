"""The hand-written language model of :mod:`tests.edge_runtime.bigram` with a LoRA slice of rank 3 and scale 1."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import onnx.parser
from msgspec.structs import replace

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.prepare import prepare
from edge_runtime.package.manifest import (
    MANIFEST,
    SIGNATURE,
    FileEntry,
    Program,
    SizeTerm,
    SliceSpec,
    TensorSpec,
    Variant,
)
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values, encode_values, key
from edge_runtime.protocol.signing import PrivateKey
from tests.edge_runtime.bigram import HEADER, HIDDEN, SLICE, Bigram, write_bigram

RANK = 3
A, B = key(SLICE, "A"), key(SLICE, "B")
PROGRAMS = {
    "block": """
block (float[B,T,6] hidden, float[1,3,6] a, float[1,6,3] b) => (float[B,T,6] hidden_out)
{ at = Transpose<perm = [0, 2, 1]>(a)
  bt = Transpose<perm = [0, 2, 1]>(b)
  inner = MatMul(hidden, at)
  mixed = MatMul(inner, bt)
  hidden_out = Add(hidden, mixed) }
""",
    "block_entry": """
block_entry (float[B,T,6] hidden, float[1,3,6] a, float[1,6,3] b, float[K,B,3,6] a_dot, float[K,B,6,3] b_dot)
  => (float[B,T,6] hidden_out, float[K,B,T,6] hidden_dot_out)
{ at = Transpose<perm = [0, 2, 1]>(a)
  bt = Transpose<perm = [0, 2, 1]>(b)
  inner = MatMul(hidden, at)
  mixed = MatMul(inner, bt)
  hidden_out = Add(hidden, mixed)
  a_dot_t = Transpose<perm = [0, 1, 3, 2]>(a_dot)
  b_dot_t = Transpose<perm = [0, 1, 3, 2]>(b_dot)
  inner_dot = MatMul(hidden, a_dot_t)
  carried = MatMul(inner_dot, bt)
  made = MatMul(inner, b_dot_t)
  hidden_dot_out = Add(carried, made) }
""",
}


def start_values() -> Values:
    """A at random and B at zero."""
    a = np.random.default_rng(8).standard_normal((1, RANK, HIDDEN)).astype(np.float32)
    return {A: a, B: np.zeros((1, HIDDEN, RANK), np.float32)}


def write_ranked_bigram(folder: Path, signer: PrivateKey) -> Bigram:
    """Write the package into ``folder``, signed."""
    tensors = (TensorSpec("A", (1, RANK, HIDDEN), "a"), TensorSpec("B", (1, HIDDEN, RANK), "b"))
    return write_with_slice(
        folder, signer, PROGRAMS, SliceSpec(SLICE, "lora", (1,), "mix", tensors), start_values()
    )


def write_with_slice(
    folder: Path, signer: PrivateKey, programs: dict[str, str], spec: SliceSpec, values: Values
) -> Bigram:
    """Write the bigram model with another slice, whose ``programs`` are ``block`` and ``block_entry``."""
    plain = write_bigram(folder, signer)
    files = {
        f"programs/{name}.onnx": onnx.parser.parse_model(HEADER + text).SerializeToString()
        for name, text in programs.items()
    }
    files["slices.safetensors"] = encode_values(values)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = plain.package.manifest
    embedding, block, head = manifest.segments
    listed = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    kept = {name: p for name, p in manifest.programs.items() if "decode" not in name and name != "block_dual"}
    made = replace(
        manifest,
        files={**manifest.files, **listed},
        programs=kept | {name: _program(name, text) for name, text in programs.items()},
        segments=(
            replace(embedding, decode=None),
            replace(block, dual="block_entry", decode=None),
            replace(head, decode=None),
        ),
        slices=(spec,),
        generation=None,
    )
    data = msgspec.json.encode(made)
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_text(signer.sign(data))
    return Bigram(Package.open(folder, signer.public_key), plain.embedding, plain.output)


def prepare_here(package: Package, folder: Path) -> PreparedPackage:
    """The package prepared in float for this process."""
    return prepare(package.for_engine("onnxruntime"), folder, OnnxEngine(), "float", 1 << 30)


def _program(name: str, text: str) -> Program:
    graph = onnx.parser.parse_model(HEADER + text).graph
    live = (SizeTerm(8.0 * HIDDEN, 1, 1, 0), SizeTerm(8.0 * HIDDEN, 1, 1, 1))
    return Program(
        tuple(value.name for value in graph.input),
        tuple(value.name.removesuffix("_out") for value in graph.output),
        {"float": Variant(f"programs/{name}.onnx", (), live=(live,))},
    )
