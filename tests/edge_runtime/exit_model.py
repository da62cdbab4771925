"""A classifier of two blocks written by hand: those of :mod:`tests.edge_runtime.bigram`, under a head over a block."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from edge_runtime.package.manifest import MANIFEST, SIGNATURE, FileEntry, Segment, SliceSpec, TensorSpec
from edge_runtime.package.package import Package
from edge_runtime.package.slices import Values, encode_values
from edge_runtime.protocol.signing import PrivateKey
from tests.edge_runtime.bigram import HIDDEN, write_bigram

FIRST, SECOND = "block_0.mix", "block_1.mix"
CORES = (f"{FIRST}/core", f"{SECOND}/core")
LABELS = ("home", "away")


def start_values(size: float = 0.0) -> Values:
    """Cores and a head, drawn from a fixed seed at a size."""
    generator = np.random.default_rng(3)
    shapes = {**dict.fromkeys(CORES, (1, HIDDEN, HIDDEN)), "head/weight": (2, HIDDEN), "head/bias": (2,)}
    return {
        name: (size * generator.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()
    }


def write_exit_model(folder: Path, signer: PrivateKey) -> Package:
    """Write the package into ``folder``, signed. Its last segment is of another task: a run must name exits."""
    made = write_bigram(folder, signer).package.manifest
    embedding, _, head = made.segments
    blocks = [Segment(f"block_{n}", "block", "block_entry", "block_dual", {}) for n in range(2)]
    core = TensorSpec("core", (1, HIDDEN, HIDDEN), "core")
    tensors = (TensorSpec("weight", (2, HIDDEN), "head.weight"), TensorSpec("bias", (2,), "head.bias"))
    state = encode_values(start_values())
    (folder / "slices.safetensors").write_bytes(state)
    manifest = replace(
        made,
        task="classification",
        labels=LABELS,
        files={
            **made.files,
            "slices.safetensors": FileEntry(len(state), hashlib.sha256(state).hexdigest()),
        },
        programs={name: program for name, program in made.programs.items() if "decode" not in name},
        segments=(replace(embedding, decode=None), *blocks, replace(head, decode=None)),
        slices=(
            SliceSpec(FIRST, "lora_xs", (1,), "mix", (core,)),
            SliceSpec(SECOND, "lora_xs", (2,), "mix", (core,)),
            SliceSpec("head", "head", (3,), "head", tensors),
        ),
        generation=None,
    )
    data = msgspec.json.encode(manifest)
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_text(signer.sign(data))
    return Package.open(folder, signer.public_key)
