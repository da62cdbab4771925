"""What every store of blobs must do, on real ones: a folder and an S3 server; and what is the server's own."""

from __future__ import annotations

import hashlib
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from coordinator.storage import s3_store
from coordinator.storage.blob_store import Blobs, BlobStore
from coordinator.storage.s3_store import S3BlobStore, open_bucket
from coordinator.storage.stores import Places
from coordinator.storage.trouble import StoreAwayError, trouble_of
from edge_runtime.errors import ConfigError, DigestError, ResourceError
from tests.coordinator.conftest import SPECS, World
from tests.coordinator.storage.bad_storage import Mood, bad_storage
from tests.coordinator.storage.servers import (
    BUCKET,
    CREDENTIALS,
    shared_s3,
)


@pytest.fixture
def endpoint() -> str:
    """Address of an S3 server."""
    return shared_s3()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The S3 server's keys in the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """An empty store of blobs of either kind."""
    if request.param == "folder":
        return BlobStore(tmp_path / "blobs")
    request.getfixturevalue("credentials")
    url = f"s3://{BUCKET}/{tmp_path.name.strip('_')}?endpoint={request.getfixturevalue('endpoint')}"
    return S3BlobStore(open_bucket(url), "blobs", BlobStore(tmp_path / "cache"))


def test_blobs_are_named_by_their_bytes(blobs: Blobs, tmp_path: Path) -> None:
    """Bytes go in once, come out as they were, are listed, swept where nobody needs them, and are then gone."""
    sha256 = blobs.put(b"one")
    assert sha256 == hashlib.sha256(b"one").hexdigest() == blobs.put(b"one")
    (tmp_path / "file").write_bytes(b"two" * 100_000)
    two = hashlib.sha256(b"two" * 100_000).hexdigest()
    blobs.put_file(tmp_path / "file", two)
    with pytest.raises(DigestError, match="changed while it was copied"):
        blobs.put_file(tmp_path / "file", hashlib.sha256(b"other").hexdigest())
    assert blobs.get(sha256) == b"one"
    path = blobs.find(two)
    assert path is not None
    assert path.read_bytes() == b"two" * 100_000
    assert set(blobs.digests()) == {sha256, two}
    with pytest.raises(DigestError, match="64 hexadecimal"):
        blobs.find("../x")
    assert blobs.sweep(lambda: {two}, before_s=0.0) == 0
    assert blobs.sweep(lambda: {two}, before_s=4e9) == 1
    assert blobs.find(sha256) is None
    with pytest.raises(DigestError, match="is missing"):
        blobs.get(sha256)
    blobs.discard(two)
    blobs.discard(two)
    assert list(blobs.digests()) == []


def test_another_machine_fetches_from_the_bucket(credentials: None, endpoint: str, tmp_path: Path) -> None:
    """What one coordinator stored another fetches; a damaged or trimmed copy on its disk is fetched again."""
    bucket = open_bucket(f"s3://{BUCKET}/two-machines?endpoint={endpoint}")
    here = S3BlobStore(bucket, "blobs", BlobStore(tmp_path / "here"))
    there = S3BlobStore(bucket, "blobs", BlobStore(tmp_path / "there"))
    sha256 = here.put(b"values")
    assert there.here(sha256) is None
    path = there.find(sha256)
    assert path is not None
    assert tmp_path / "there" in path.parents
    path.write_bytes(b"damage")
    assert there.get(sha256) == b"values"
    BlobStore(tmp_path / "there").trim(3)
    assert there.here(sha256) is None
    assert there.get(sha256) == b"values"
    assert not list((tmp_path / "there").glob(".*"))


def test_keys_come_from_a_file(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in a file as AWS's programs keep them serve too; a file without them is refused by name."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    url = f"s3://{BUCKET}/file?endpoint={endpoint}"
    with pytest.raises(ConfigError, match=f"{file} has no aws_access_key_id"):
        open_bucket(url)
    file.write_text(
        "\n".join(["[default]", *(f"{name.lower()} = {key}" for name, key in CREDENTIALS.items())])
    )
    blobs = S3BlobStore(open_bucket(url), "blobs", BlobStore(tmp_path / "cache"))
    assert blobs.get(blobs.put(b"x")) == b"x"
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE")
    for name, value in {**CREDENTIALS, "AWS_SECRET_ACCESS_KEY": "another"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=r"cannot use the bucket now: the S3 storage: .*") as refused:
        open_bucket(url)
    assert "another" not in str(refused.value)


@pytest.mark.parametrize("mood", ["errors", "closed", "silence", "other bytes"])
def test_a_bad_storage_is_trouble_and_not_damage(
    credentials: None, endpoint: str, tmp_path: Path, mood: Mood, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors, silence and other bytes are told in one line, keep nothing wrong, and are over with their cause."""
    monkeypatch.setattr(s3_store, "SILENCE", timedelta(seconds=0.2))
    monkeypatch.setattr(s3_store, "MOST_RETRYING", timedelta(seconds=1))
    with bad_storage(endpoint) as way:
        bucket = open_bucket(f"s3://{BUCKET}/{tmp_path.name}?endpoint={way.url}")
        sha256 = S3BlobStore(bucket, "blobs", BlobStore(tmp_path / "other")).put(b"values")
        blobs = S3BlobStore(bucket, "blobs", BlobStore(tmp_path / "cache"))
        way.mood = mood
        with pytest.raises(StoreAwayError) as away:
            blobs.get(sha256)
        words = trouble_of(away.value)
        assert words is not None
        assert "the S3 storage" in words
        assert "\n" not in words
        if mood == "other bytes":
            assert f"{sha256} has other bytes than its name says" in words
        else:
            with pytest.raises(StoreAwayError):
                blobs.put(b"more")
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        way.mood = "well"
        assert blobs.get(sha256) == b"values"
        assert blobs.get(blobs.put(b"more")) == b"more"


def test_devices_are_told_to_come_again_while_the_storage_is_bad(
    credentials: None, endpoint: str, tmp_path: Path
) -> None:
    """While the storage answers with errors a device gets 503 for blobs and results, the round waits, and once it is
    well again the run ends in the bits of one on a folder."""
    values = []
    with bad_storage(endpoint) as way:
        for kind, places in (
            ("folder", None),
            ("bucket", Places(blobs=f"s3://{BUCKET}/told?endpoint={way.url}")),
        ):
            (tmp_path / kind).mkdir()
            world = World(tmp_path / kind, specs=SPECS, places=places)
            devices = world.fleet("a", "b", "c")
            world.create_run(rounds=1, seed=5)
            world.play()
            tasks = [(device, task) for device in devices if (task := device.task()) is not None]
            if places is not None:
                shutil.rmtree(world.stores.folder / "fetched" / "blobs")
                (world.stores.folder / "fetched" / "blobs").mkdir()
                way.mood = "errors"
                for answer in (
                    tasks[0][0].deliver(tasks[0][0].result(tasks[0][1])),
                    tasks[0][0].send("GET", f"/v1/blobs/{tasks[0][1].state}"),
                ):
                    assert answer.status_code == 503
                    assert answer.json()["code"] == "trouble"
                    assert "the S3 storage" in answer.json()["message"]
                way.mood = "well"
            for device, task in tasks:
                assert device.send("GET", f"/v1/blobs/{task.state}").status_code == 200
                assert device.deliver(device.result(task)).json() == {"status": "counted"}
            if places is not None:
                way.mood = "errors"
                shutil.rmtree(world.stores.folder / "fetched" / "private")
                (world.stores.folder / "fetched" / "private").mkdir()
                with pytest.raises(StoreAwayError):
                    world.play()
                assert world.round_state() == "aggregating"
                way.mood = "well"
            world.play()
            assert world.run()["state"] == "finished"
            values.append(world.values())
            world.stores.storage.close()
    assert values[0] == values[1]
