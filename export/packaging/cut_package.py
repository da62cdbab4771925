"""A package cut to its first ranks: the same programs and weights, smaller slices, a manifest that says so.

Whoever trained LoRA over nested ranks (``rank_mode``) has a slice of every rank in one package (DyLoRA, Valipour et al.
2023; on a base in 4 bits QDyLoRA, Rajabzadeh et al. 2024, arXiv 2402.10462). Cutting picks one, without torch.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import MANIFEST, SIGNATURE, FileEntry
from edge_runtime.package.package import Package
from edge_runtime.package.ranked_values import cut
from edge_runtime.package.ranks import with_rank
from edge_runtime.package.slices import Values, decode_values, encode_values
from edge_runtime.protocol.signing import PrivateKey


def cut_package(
    package: Package, rank: int, output: Path, signer: PrivateKey, values: Values | None = None
) -> Package:
    """Write the package at a lower rank, or nothing.

    Args:
        package: package to cut, whose files were verified.
        rank: number of first ranks to keep.
        output: folder to create.
        signer: key that signs the new manifest.
        values: trained values of the package that the new one starts from; None for its own initial values.

    Raises:
        ModelError: ``output`` exists.
        ConfigError: the package has no such rank.
    """
    if output.exists():
        raise ModelError(f"{output} exists already; choose another --output or remove it")
    manifest = package.manifest
    narrowed = with_rank(manifest, rank)
    if values is None:
        values = decode_values(package.path(manifest.initial_state).read_bytes(), manifest.slices)
    state = encode_values(cut(values, narrowed.slices))
    listed = FileEntry(len(state), hashlib.sha256(state).hexdigest())
    made = replace(narrowed, files={**narrowed.files, manifest.initial_state: listed})
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".cut-") as temporary:
        folder = Path(temporary) / "package"
        for name in manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name != manifest.initial_state:
                shutil.copyfile(package.path(name), folder / name)
        write_durably(folder / manifest.initial_state, state)
        data = msgspec.json.encode(made, order="sorted")
        write_durably(folder / MANIFEST, data)
        write_durably(folder / SIGNATURE, signer.sign(data).encode())
        rename_durably(folder, output)
    return Package.open(output, signer.public_key)
