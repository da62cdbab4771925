"""Which model is used: a package folder, or the release that the agent made the current one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.store import Store, TakenRelease
from edge_runtime.errors import ConfigError, DigestError, SignatureError
from edge_runtime.protocol.messages import Release
from edge_runtime.protocol.signing import generate_key
from edge_runtime.serving.session import InferenceSession
from edge_runtime.serving.source import Model, model_of_folder, model_of_release
from tests.edge_runtime.serving.conftest import publisher_key_of


def of_folder(model: Model, folder: Path, **changes: object) -> Model:
    """The hand-written package from a folder."""
    options = {
        "slices": None,
        "publisher_key": publisher_key_of(model),
        "cap_bytes": 1 << 30,
        "threads": 1,
        "engine": "onnxruntime",
        "prepared_folder": None,
        **changes,
    }
    return model_of_folder(folder, **options)


def test_a_package_is_verified_before_it_is_used(language_model: Model, tmp_path: Path) -> None:
    """Another publisher, a changed file and missing values are refused; values are the package's own by default."""
    folder = Path(shutil.copytree(language_model.package.folder, tmp_path / "package"))
    found = of_folder(language_model, folder)
    assert found.state_path == folder / "slices.safetensors"
    assert found.prepared_folder == tmp_path / "package-prepared"
    with pytest.raises(SignatureError):
        of_folder(language_model, folder, publisher_key=generate_key().public_key)
    with pytest.raises(ConfigError, match="edge-coordinator run fetch-slices writes such a file"):
        of_folder(language_model, folder, slices=tmp_path / "missing")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DigestError):
        of_folder(language_model, folder)


def test_the_current_release_is_found_and_followed(language_model: Model, tmp_path: Path) -> None:
    """Before the first release one line says what to do; after a switch the next look finds the new values."""
    config = DeviceConfig(
        coordinator_url="http://localhost",
        state_folder=tmp_path / "state",
        device_name="board-1",
        device_class="generic",
        publisher_key=publisher_key_of(language_model),
        cap=1 << 30,
        threads=1,
        train=False,
    )
    store = Store(config.state_folder, disk_quota_bytes=1 << 30)
    with pytest.raises(ConfigError, match=r"has taken no release yet .*edge-coordinator release publish"):
        model_of_release(config)
    sha256 = language_model.package.sha256
    shutil.copytree(language_model.package.folder, store.packages.folder_of(sha256))
    for number, digest in ((1, "a" * 64), (2, "b" * 64)):
        release = Release(
            number=number,
            run_id="r-1",
            round=0,
            package=sha256,
            package_signature="A" * 86 + "==",
            values=digest,
            sequence_limit=16,
        )
        store.releases.switch_to(TakenRelease(release), language_model.state_path)
        model, told = model_of_release(config)
        assert (told, model.state_path.stem) == (str(number), digest)
    model.prepare()
    with InferenceSession.start(model.job()) as session:
        assert session.ready.sequence_limit == 16
