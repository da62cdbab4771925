"""Models to serve: a classifier with values as after a run, and a language model that generates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.package.package import Package
from edge_runtime.package.slices import Values, encode_values, shapes
from edge_runtime.protocol.signing import generate_key
from edge_runtime.serving.source import Model
from tests.edge_runtime.bigram import write_bigram

CAP_BYTES = 1 << 30


@pytest.fixture(scope="session")
def values(exported_plain) -> Values:
    """Values of every slice of the float package, as after a run."""
    generator = np.random.default_rng(5)
    return {
        name: (0.3 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes(exported_plain.package.manifest.slices).items()
    }


@pytest.fixture(scope="session")
def classifier(exported_plain, values, tmp_path_factory) -> Model:
    """The tiny BERT's float package with these values, prepared."""
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "slices.safetensors").write_bytes(encode_values(values))
    model = Model(
        exported_plain.package, folder / "slices.safetensors", folder / "prepared", CAP_BYTES, threads=1
    )
    model.prepare()
    return model


@pytest.fixture(scope="session")
def language_model(tmp_path_factory) -> Model:
    """The language model that was written by hand, prepared."""
    folder = tmp_path_factory.mktemp("language-model")
    key = generate_key()
    write_bigram(folder / "package", key)
    package = Package.open(folder / "package", key.public_key)
    (folder / "publisher.txt").write_text(key.public_key)
    model = Model(package, package.path("slices.safetensors"), folder / "prepared", CAP_BYTES, threads=1)
    model.prepare()
    return model


def publisher_key_of(model: Model) -> str:
    """Public key that signed the hand-written package."""
    return (Path(model.package.folder).parent / "publisher.txt").read_text()
