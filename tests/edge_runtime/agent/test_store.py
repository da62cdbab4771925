import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_runtime.agent import store as store_module
from edge_runtime.agent.store import Identity, Store
from edge_runtime.durable import write_durably
from edge_runtime.errors import ConfigError, DeviceError, DigestError, ResourceError, SignatureError
from edge_runtime.exit_status import exit_code_of
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.packages import FILES, make_manifest

PUBLISHER = generate_key()


def open_store(folder, quota: int = 10_000) -> Store:
    """The store as a fresh start of the agent finds it."""
    store = Store(folder / "state", disk_quota_bytes=quota)
    with store.locked():
        return store


def put(store: Store, data: bytes, age_s: float = 0.0) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    store.blobs.part(sha256).write_bytes(data)
    store.blobs.accept(sha256)
    path = store.blobs.open_path(sha256)
    os.utime(path, (1e9 - age_s, 1e9 - age_s))
    return sha256


def lay_out(store: Store):
    for data in FILES.values():
        put(store, data)
    manifest = make_manifest()
    data = msgspec.json.encode(manifest)
    return store.packages.lay_out(data, manifest, PUBLISHER.sign(data), PUBLISHER.public_key)


def test_key_and_identity_survive_a_restart(tmp_path) -> None:
    """A second start finds the same key and identity, in files that only the owner may read."""
    store = open_store(tmp_path)
    assert store.identity() is None
    key = store.key()
    identity = Identity("d-1", generate_key().public_key)
    store.save_identity(identity)
    again = open_store(tmp_path)
    assert again.key().public_key == key.public_key
    assert again.identity() == identity
    assert stat.S_IMODE((again.folder / "device.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(again.folder.stat().st_mode) == 0o700


def test_a_pending_result_survives_until_dropped(tmp_path) -> None:
    """An unsent result is there after a restart, and gone once acknowledged."""
    store = open_store(tmp_path)
    assert store.pending() is None
    store.keep_pending(b"result")
    store = open_store(tmp_path)
    assert store.pending() == b"result"
    store.drop_pending()
    assert store.pending() is None


def test_only_one_package_stays_prepared(tmp_path) -> None:
    """Asking where a package is prepared removes what was made of others, and scratch that a killed worker left."""
    store = open_store(tmp_path)
    for name in ("a" * 64, ".prepare-killed"):
        (tmp_path / "state" / "prepared" / name / "final").mkdir(parents=True)
    (tmp_path / "state" / "prepared" / ("b" * 64)).mkdir()
    assert store.prepared_folder("b" * 64) == tmp_path / "state" / "prepared" / ("b" * 64)
    assert [path.name for path in (tmp_path / "state" / "prepared").iterdir()] == ["b" * 64]


def test_one_folder_serves_one_process(tmp_path) -> None:
    """A second process is told that the folder is in use."""
    store = open_store(tmp_path)
    program = (
        "import sys; from pathlib import Path; from edge_runtime.agent.store import Store\n"
        "with Store(Path(sys.argv[1]), disk_quota_bytes=1).locked(): pass"
    )
    command = [sys.executable, "-c", program, str(store.folder)]
    with store.locked():
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    third = subprocess.run(command, check=False)
    assert third.returncode == 0
    assert "another edge-runtime uses state_folder" in second.stderr


def test_half_written_files_are_removed_at_start(tmp_path) -> None:
    """Temporary files of a killed process go; downloads in progress stay, to be continued."""
    store = open_store(tmp_path)
    (store.folder / ".pending.result.77.tmp").write_bytes(b"half")
    (store.folder / "packages" / "abc.tmp" / "weights").mkdir(parents=True)
    (store.folder / "work" / "change.safetensors").write_bytes(b"old")
    store.blobs.part("a" * 64).write_bytes(b"begun")
    store = open_store(tmp_path)
    assert not list(store.folder.rglob("*.tmp"))
    assert not list((store.folder / "work").iterdir())
    assert store.blobs.held_bytes("a" * 64) == 5


@pytest.mark.parametrize(
    "damage", [b"{", b'{"device_id": "\xff", "setup": "\xff"}', b'{"other": ' + b"[" * 100_000, b""]
)
def test_unreadable_files_are_named(tmp_path, damage: bytes) -> None:
    """A damaged identity or release file, whatever its bytes, is a ConfigError that says what to do."""
    store = open_store(tmp_path)
    (store.folder / "identity.json").write_bytes(damage)
    with pytest.raises(ConfigError, match="set a new token, and run: edge-runtime enrol"):
        store.identity()
    (store.folder / "release.json").write_bytes(damage)
    with pytest.raises(ConfigError, match="takes the next release anew"):
        store.releases.state()


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path) -> None:
    """A file in the folder's place is a ConfigError."""
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match="state_folder"):
        open_store(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    """If the rename cannot happen, the target is untouched and nothing is left beside it."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OSError, match="target"):
        write_durably(target, b"new")
    assert list(tmp_path.iterdir()) == [target]


def test_a_download_with_other_bytes_is_thrown_away(tmp_path) -> None:
    """Bytes that do not hash to their name never become a blob."""
    store = open_store(tmp_path)
    store.blobs.part("a" * 64).write_bytes(b"other")
    with pytest.raises(DigestError):
        store.blobs.accept("a" * 64)
    assert not store.blobs.has("a" * 64)
    assert store.blobs.held_bytes("a" * 64) == 0


def test_a_blob_damaged_on_disk_is_removed(tmp_path) -> None:
    """After a restart a blob is hashed before use, and a damaged one makes room for a new download."""
    store = open_store(tmp_path)
    sha256 = put(store, b"weights")
    store.blobs.open_path(sha256).write_bytes(b"weighty")
    store = open_store(tmp_path)
    with pytest.raises(DigestError, match="damaged"):
        store.blobs.open_path(sha256)
    assert not store.blobs.has(sha256)


def test_the_least_recently_used_blob_gives_way(tmp_path) -> None:
    """When the quota is met the oldest blob goes, unless it must stay."""
    store = open_store(tmp_path, quota=100)
    oldest, older, newer = (put(store, bytes([n]) * 30, age_s=100.0 - n) for n in range(3))
    store.blobs.make_room(40, keep={oldest})
    assert store.blobs.has(oldest)
    assert not store.blobs.has(older)
    assert store.blobs.has(newer)


def test_what_cannot_fit_is_refused_with_figures(tmp_path) -> None:
    """If even an empty cache were too small, the error states quota and demand."""
    store = open_store(tmp_path, quota=100)
    with pytest.raises(DeviceError, match=r"101 bytes.*disk_quota is 100"):
        store.blobs.make_room(101, keep=())


def test_more_than_the_disk_has_is_refused_with_figures(tmp_path) -> None:
    """A quota larger than the disk does not help: free space is checked too."""
    store = open_store(tmp_path, quota=1 << 60)
    with pytest.raises(DeviceError, match=r"of downloads do not fit: the disk of .* has .* free"):
        store.blobs.make_room(1 << 59, keep=())


def test_a_package_is_laid_out_from_blobs(tmp_path) -> None:
    """The laid-out folder opens and verifies, and takes no space of its own."""
    store = open_store(tmp_path)
    package = lay_out(store)
    package.verify_files()
    assert package.path("weights/block.bin").stat().st_nlink == 2
    assert [path.name for path in (store.folder / "packages").iterdir()] == [package.sha256]


def test_laying_out_again_repairs_what_was_changed(tmp_path) -> None:
    """A package folder is rebuilt from blobs on every use, so nothing that was slipped in survives."""
    store = open_store(tmp_path)
    package = lay_out(store)
    (package.folder / "weights/block.bin").unlink()
    (package.folder / "weights/other.bin").write_bytes(b"slipped in")
    again = lay_out(store)
    again.verify_files()
    assert not (again.folder / "weights/other.bin").exists()


def test_a_package_of_another_publisher_is_not_opened(tmp_path) -> None:
    """Laying out checks the signature with the publisher's key."""
    store = open_store(tmp_path)
    for data in FILES.values():
        put(store, data)
    manifest = make_manifest()
    data = msgspec.json.encode(manifest)
    with pytest.raises(SignatureError):
        store.packages.lay_out(data, manifest, generate_key().sign(data), PUBLISHER.public_key)


def test_a_state_folder_is_closed_to_others(tmp_path) -> None:
    """A folder that was there before and open to others is closed when it becomes a state folder."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    Store(folder, disk_quota_bytes=1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_full_disk_at_the_start_passes(tmp_path, monkeypatch) -> None:
    """An agent that finds no room for its folder or its lock ends with a code that its unit tries again."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path / "there", disk_quota_bytes=1)
    for where, name in ((Path, "mkdir"), (store_module, "claim_folder"), (store_module, "write_durably")):
        monkeypatch.setattr(where, name, full)
    starts = (
        lambda: Store(tmp_path / "state", disk_quota_bytes=1),
        lambda: store.locked().__enter__(),
        store.key,
        lambda: store.save_identity(Identity("d-1", "k")),
    )
    monkeypatch.setattr("edge_runtime.protocol.signing.write_durably", full)
    for start in starts:
        assert exit_code_of(start) == ResourceError.exit_code == 19
