"""Bad input, each through the entry point that meets it first: a real command line or a real socket.

Whatever comes in: one clear line that names the thing, the limit and the way out, the documented exit code
or a 4xx with its reason code, and nothing has changed on any disk.

| input                                      | test                                                   |
|--------------------------------------------|--------------------------------------------------------|
| a folder that is no model                  | test_exporter_refuses[no model]                        |
| model weights that are cut off             | test_exporter_refuses[weights cut off]                 |
| model weights that are not all there       | test_exporter_refuses[a weight missing]                |
| no block structure that is recognised      | test_exporter_refuses[no blocks]                       |
| an architecture that cannot be captured    | test_exporter_refuses[encoder and decoder]             |
| target modules that match nothing          | test_exporter_refuses[targets match nothing]           |
| a label outside the label set              | test_exporter_refuses[label outside the set]           |
|                                            | test_device_reports[outsider]                          |
| an empty data file                         | test_exporter_refuses[no rows]                         |
|                                            | test_device_reports[empty]                             |
|                                            | test_check_names_the_row[empty]                        |
| a malformed row                            | test_exporter_refuses[malformed row]                   |
|                                            | test_device_reports[malformed]                         |
|                                            | test_check_names_the_row[malformed]                    |
| a package with a flipped byte              | test_run_is_refused_for_its_package[flipped ...]       |
|                                            | test_adapter_is_refused[flipped ...]                   |
|                                            | test_damaged_blob_is_not_used                          |
| a wrong signature                          | test_run_is_refused_for_its_package[another signer]    |
|                                            | test_adapter_is_refused[another signer]                |
|                                            | test_device_reports[stranger]                          |
| a package of a newer format                | test_run_is_refused_for_its_package[newer format]      |
|                                            | test_adapter_is_refused[newer format]                  |
| a task larger than the cap                 | test_small_device_is_told_both_numbers                 |
| a result with NaN                          | test_result_is_refused[nan]                            |
| a result of another shape                  | test_result_is_refused[another shape]                  |
| a result with an unknown or missing slice  | test_result_is_refused[unknown slice, missing slice]   |
| a result with a wrong digest               | test_result_is_refused[wrong digest]                   |
| a result for another round or task         | test_result_is_refused[another round, another task]    |
| a result sent twice                        | test_result_is_counted_once                            |
| an unsigned request                        | test_request_is_refused[unsigned]                      |
| a replayed request                         | test_replayed_request_is_refused                       |
| a wrongly signed request                   | test_request_is_refused[another ..., an hour ago, ...] |
| an unknown key in device.toml              | test_unknown_device_key                                |
| an unknown key in run.toml                 | test_run_is_refused[unknown key]                       |
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import urllib3

from edge_runtime.package.manifest import FORMAT_VERSION
from edge_runtime.package.package import Package
from edge_runtime.package.slices import encode_values, shapes
from edge_runtime.protocol.messages import (
    CheckInRequest,
    DeviceEvent,
    EnrolRequest,
    EnrolResponse,
    MemoryReport,
    Refusal,
    Result,
    SignedTask,
    Task,
    decode,
    encode,
    encode_result,
)
from edge_runtime.protocol.signing import PrivateKey, generate_key, sign_request
from tests.end_to_end.harness import Fleet, command
from tests.end_to_end.workshop import Workshop, rows, write_model

SECRET = "aardvark-5150"


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on standard error of a command that failed with this exit code."""
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert SECRET not in line
    return line


def digest(*folders: Path) -> str:
    """One hash over names and bytes of everything in some folders."""
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            total.update(str(path).encode() + b"\0" + (path.read_bytes() if path.is_file() else b""))
    return total.hexdigest()


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # it may be a link to the good file
    path.write_bytes(data)


# --- the exporter ---

GOOD_ROW = {"text": "my card is lost", "label": "card_arrival"}
BAD_DATA = {
    "label outside the set": (
        json.dumps({"text": SECRET, "label": "weather"}) + "\n",
        "line 2 has a label outside",
    ),
    "no rows": (None, "is empty; it needs at least one row"),
    "malformed row": (
        f'{{"text": "{SECRET}"\n',
        'line 2 is not JSON; it must be an object {"text": "…", "label": "…"}',
    ),
}


def no_model(workshop: Workshop, folder: Path) -> tuple[list[object], int, str]:
    """An empty folder."""
    (folder / "model").mkdir()
    return [], 31, "is not a Hugging Face model folder: it has no config.json"


def cut_weights(workshop: Workshop, folder: Path) -> tuple[list[object], int, str]:
    """A model whose weights were copied halfway."""
    shutil.copytree(workshop.folder / "model", folder / "model")
    weights = folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return [], 31, "is not a whole safetensors file: "


def missing_weights(workshop: Workshop, folder: Path) -> tuple[list[object], int, str]:
    """A model without one of its tensors, which would be drawn at random."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(workshop.folder / "model", folder / "model")
    weights = load_file(folder / "model/model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    save_file(
        {k: v for k, v in weights.items() if k != name}, folder / "model/model.safetensors", {"format": "pt"}
    )
    return (
        [],
        31,
        f"lacks 1 tensors of its architecture, the first is {name}; download or save the model again",
    )


def no_blocks(workshop: Workshop, folder: Path) -> tuple[list[object], int, str]:
    """An encoder without layers."""
    write_model(folder / "model", num_hidden_layers=0)
    return (
        [],
        31,
        "BertModel has no block structure this exporter recognises: looked for a ModuleList of blocks",
    )


def encoder_and_decoder(workshop: Workshop, folder: Path) -> tuple[list[object], int, str]:
    """A T5, which needs two inputs."""
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    T5Model(config).save_pretrained(folder / "model")
    return ["--targets", "q,v"], 31, "describes t5, an encoder with "


def no_target(workshop: Workshop, folder: Path) -> tuple[list[object], int, str]:
    """A slip in --targets."""
    shutil.copytree(workshop.folder / "model", folder / "model")
    return (
        ["--targets", "query,valeu"],
        31,
        "target module 'valeu' matches no linear layer of the blocks; they have",
    )


def bad_data(name: str) -> Callable[[Workshop, Path], tuple[list[object], int, str]]:
    """Check data that cannot be used."""

    def prepare(workshop: Workshop, folder: Path) -> tuple[list[object], int, str]:
        second, named = BAD_DATA[name]
        shutil.copytree(workshop.folder / "model", folder / "model")
        path = folder / "bad.jsonl"
        path.write_text("" if second is None else json.dumps(GOOD_ROW) + "\n" + second)
        return ["--check-data", path], 12, named

    return prepare


EXPORTS: dict[str, Callable[[Workshop, Path], tuple[list[object], int, str]]] = {
    "no model": no_model,
    "weights cut off": cut_weights,
    "a weight missing": missing_weights,
    "no blocks": no_blocks,
    "encoder and decoder": encoder_and_decoder,
    "targets match nothing": no_target,
    **{name: bad_data(name) for name in BAD_DATA},
}


@pytest.mark.parametrize("prepare", EXPORTS.values(), ids=EXPORTS.keys())
def test_exporter_refuses(workshop, tmp_path, prepare) -> None:
    """``edge-export package`` ends with its one line and code, and leaves neither package nor scratch behind."""
    options, code, named = prepare(workshop, tmp_path)
    before = digest(tmp_path)
    done = workshop.export(tmp_path / "model", tmp_path / "package", *options)
    assert named in one_line(done, code)
    assert digest(tmp_path) == before


# --- packages ---


def flipped_weight(workshop: Workshop, package: Path) -> str:
    """One bit of one weight file."""
    path = sorted((package / "weights").iterdir())[0]
    flip(path)
    return f"{path} does not match the sha256 in its manifest; fetch or export it again"


def flipped_manifest(workshop: Workshop, package: Path) -> str:
    """One bit of the manifest."""
    flip(package / "manifest.json")
    return "signature"


def other_signer(workshop: Workshop, package: Path) -> str:
    """A manifest signed by somebody else."""
    (package / "manifest.sig").write_text(generate_key().sign((package / "manifest.json").read_bytes()))
    return workshop.publisher_key


def newer_format(workshop: Workshop, package: Path) -> str:
    """A package that next year's exporter wrote and its publisher signed."""
    manifest = {
        **json.loads((package / "manifest.json").read_bytes()),
        "format_version": FORMAT_VERSION + 1,
        "news": [],
    }
    data = json.dumps(manifest).encode()
    (package / "manifest.json").write_bytes(data)
    (package / "manifest.sig").write_text(PrivateKey.load(workshop.folder / "publisher.key").sign(data))
    return f"package format {FORMAT_VERSION + 1} is newer than {FORMAT_VERSION}, the newest this program reads; upgrade"


#: What was done to the package, the reason code of the coordinator, and the exit code of ``edge-export adapter``.
PACKAGES: dict[str, tuple[Callable[[Workshop, Path], str], int]] = {
    "flipped weight": (flipped_weight, 34),
    "flipped manifest": (flipped_manifest, 35),
    "another signer": (other_signer, 35),
    "newer format": (newer_format, 33),
}


def stored(site: Fleet) -> tuple[str, list[object]]:
    """What a refused request must not change: the coordinator's files, and its database.

    Left out are what a verified request uses up or moves whatever comes of it: nonces, traffic, time of
    the last check-in.
    """
    tables = ("runs", "slots", "tasks", "results", "evaluations", "events", "tokens")
    content: list[object] = [site.query(f"SELECT * FROM {table}") for table in tables]  # noqa: S608 - names above
    content.append(site.query("SELECT run_id, round, state, values_sha256 FROM rounds"))
    content.append(site.query("SELECT device_id, name, public_key, revoked_s FROM devices"))
    return digest(site.state / "blobs", site.state / "private", site.state / "packages"), content


@pytest.mark.parametrize("damage", [damage for damage, _ in PACKAGES.values()], ids=PACKAGES.keys())
def test_run_is_refused_for_its_package(workshop, site, tmp_path, damage) -> None:
    """``edge-coordinator run create`` takes no package that is damaged, not its publisher's, or too new."""
    shutil.copytree(workshop.package().folder, tmp_path / "package")
    named = damage(workshop, tmp_path / "package")
    before, on_disk = stored(site), digest(tmp_path)
    done = site.operate("run", "create", site.write_run(package=tmp_path / "package"))
    assert named in one_line(done, 22)
    assert (stored(site), digest(tmp_path)) == (before, on_disk)


@pytest.mark.parametrize(("damage", "code"), PACKAGES.values(), ids=PACKAGES.keys())
def test_adapter_is_refused(workshop, tmp_path, damage, code: int) -> None:
    """``edge-export adapter`` reads no such package either, and writes nothing."""
    shutil.copytree(workshop.package().folder, tmp_path / "package")
    named = damage(workshop, tmp_path / "package")
    before = digest(tmp_path)
    done = command(
        *("export.cli", "adapter", tmp_path / "package", "--publisher-key", workshop.publisher_key),
        *("--slices", workshop.package().folder / "slices.safetensors"),
        *("--base-model", "tiny", "--output", tmp_path / "adapter"),
    )
    assert named in one_line(done, code)
    assert digest(tmp_path) == before


RUNS = {
    "unknown key": ({"speed": 3}, 11, "run.toml: unknown key 'speed'"),
    "unknown slice": (
        {"slices": ["encoder.layer.9"]},
        22,
        "slices names 'encoder.layer.9'; package model has",
    ),
    "no package": ({"package": "/nowhere"}, 22, "package names /nowhere, which is no folder"),
    "no evaluation data": ({"evaluation": {"data": "/nowhere"}}, 22, "/nowhere, which is no file here"),
    "a limit": ({"rounds": -1}, 11, "run.toml: rounds is -1, it must be a whole number >= 0"),
}


@pytest.mark.parametrize(("changes", "code", "named"), RUNS.values(), ids=RUNS.keys())
def test_run_is_refused(site, changes: dict[str, object], code: int, named: str) -> None:
    """``edge-coordinator run create`` names the key that cannot be used, and queues nothing."""
    before = stored(site)
    assert named in one_line(site.operate("run", "create", site.write_run(**changes)), code)
    assert stored(site) == before


# --- devices ---


def test_unknown_device_key(tmp_path) -> None:
    """``edge-runtime run`` refuses a configuration with a key it does not know, before it makes a state folder."""
    config = tmp_path / "device.toml"
    config.write_text('coordinator_url = "http://127.0.0.1:9"\nstate_folder = "state"\nthread = 2\n')
    before = digest(tmp_path)
    done = command("edge_runtime.cli", "run", "--config", config)
    assert "device.toml: unknown key 'thread'; did you mean 'threads'?" in one_line(done, 11)
    assert digest(tmp_path) == before


@pytest.fixture(scope="module")
def faulty(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet in which one device is sound and every other has a fault of its own."""
    with Fleet(tmp_path_factory.mktemp("faulty") / "fleet", workshop.package()) as fleet:
        good = rows()[:8]
        fleet.add_device("sound", good)
        fleet.add_device("small", good, cap="60M")
        fleet.add_device("stranger", good, publisher_key=generate_key().public_key)
        fleet.add_device("empty", [])
        fleet.add_device("outsider", [*good[:4], {"text": SECRET, "label": "weather"}])
        fleet.add_device("malformed", [*good[:2], {"txt": SECRET}])  # type: ignore[list-item]
        fleet.create_run(devices_per_round=5, min_devices=6, min_results=1)
        yield fleet


REPORTS = {
    "stranger": "SignatureError: the signature of package ",
    "empty": "DataError: {folder}/data.jsonl is empty; it needs at least one row",
    "outsider": "DataError: {folder}/data.jsonl line 5 has a label outside the package's set of 4; correct",
    "malformed": "DataError: {folder}/data.jsonl line 3 has no column 'text'; it must be an object",
}


@pytest.mark.parametrize("name", REPORTS)
def test_device_reports(faulty, name: str) -> None:
    """A device that cannot do its task gives it back with the reason, quotes no row, and lives on."""
    events = faulty.wait(f"an event of {name}", lambda: faulty.events(name, "task_failed"))
    device = faulty.devices[name]
    assert events[0].message.startswith(REPORTS[name].format(folder=device.folder))
    assert SECRET not in device.log + events[0].message
    assert device.program.process.poll() is None


def test_small_device_is_told_both_numbers(faulty) -> None:
    """A device whose cap is under what any task needs gets none; operator and device learn both numbers."""
    (event,) = faulty.wait("the event", lambda: faulty.events("small", "cap_too_small"))
    assert "MiB, the cap is 60.0 MiB; grant more memory to serve run" in event.message
    assert faulty.query("SELECT count(*) FROM tasks JOIN devices USING (device_id) WHERE name = 'small'") == [
        (0,)
    ]
    faulty.wait("a log line", lambda: event.message in faulty.devices["small"].log)


def test_sound_device_is_not_held_up(faulty) -> None:
    """The faults of the others do not keep a sound device's result from being counted."""
    faulty.wait("a result", lambda: faulty.query("SELECT * FROM results"))
    assert "status=counted" in faulty.devices["sound"].log


@pytest.mark.parametrize(
    ("name", "line"), [("empty", "is empty"), ("malformed", "line 3 has no column 'text'")]
)
def test_check_names_the_row(faulty, name: str, line: str) -> None:
    """``edge-runtime check`` finds bad rows before a task does, and ends with the code of data errors."""
    done = command("edge_runtime.cli", "check", "--config", faulty.devices[name].folder / "device.toml")
    (finding,) = [finding for finding in done.stdout.splitlines() if finding.startswith("failed")]
    assert done.returncode == 12
    assert line in finding
    assert SECRET not in done.stdout + done.stderr


def test_damaged_blob_is_not_used(workshop, tmp_path) -> None:
    """A weight file that was damaged on the coordinator's disk is thrown away by the device, and reported."""
    with Fleet(tmp_path / "fleet", workshop.package()) as fleet:
        fleet.create_run(devices_per_round=1, min_devices=1, min_results=1, rounds=1)
        package = Package.open(workshop.package().folder, workshop.publisher_key)
        weight = next(entry for name, entry in package.manifest.files.items() if name.startswith("weights/"))
        flip(fleet.state / "blobs" / weight.sha256[:2] / weight.sha256)
        device = fleet.add_device("ash", rows()[:8])
        events = fleet.wait("the event", lambda: fleet.events("ash", "task_failed"))
        assert events[0].message.startswith(
            f"DigestError: the download of blob {weight.sha256} does not match"
        )
        assert not (device.folder / "state/blobs" / weight.sha256).exists()


# --- the wire ---


class Wire:
    """A device made of raw HTTP requests, so that it can send what no client of ours would."""

    def __init__(self, site: Fleet) -> None:
        self.url = site.url
        self.key = generate_key()
        self.pool = urllib3.PoolManager(retries=False)
        token = site.admin.create_token()
        enrol = EnrolRequest(token, "wire", "test", self.key.public_key)
        answer = self.pool.request("POST", f"{self.url}/v1/devices/enrol", body=encode(enrol))
        self.device_id = decode(answer.data, EnrolResponse).device_id
        self.check_in = encode(CheckInRequest("test", 1 << 30, 0, 8))

    def headers(self, method: str, path: str, body: bytes, **changes: object) -> dict[str, str]:
        """Signature headers; keywords replace what is signed."""
        signed = {"device_id": self.device_id, "method": method, "path": path, "body": body}
        now = {"now_s": int(time.time()), "nonce": secrets.token_urlsafe(16)}
        return sign_request(**{"key": self.key, **signed, **now, **changes})

    def send(
        self, method: str, path: str, body: bytes, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send a request, well signed unless ``headers`` are given; returns status and body."""
        headers = self.headers(method, path, body) if headers is None else headers
        kind = {"Content-Type": "application/msgpack" if path.endswith("/result") else "application/json"}
        answer = self.pool.request(method, self.url + path, body=body, headers={**headers, **kind})
        return answer.status, answer.data

    def deliver(self, result: Result, task_id: str) -> tuple[int, bytes]:
        """PUT a result."""
        return self.send("PUT", f"/v1/tasks/{task_id}/result", encode_result(result))

    def take_task(self) -> Task | None:
        """Check in; the task, if there is one."""
        status, body = self.send("POST", "/v1/check-in", self.check_in)
        assert status == 200, body
        answer = json.loads(body)
        return decode(msgspec.convert(answer, SignedTask).task.encode(), Task) if "task" in answer else None


@pytest.fixture(scope="module")
def wire(site: Fleet) -> Wire:
    """An enrolled device of the site."""
    return Wire(site)


@pytest.fixture(scope="module")
def task(site: Fleet, wire: Wire) -> Task:
    """The task of the site's run, handed out to the wire and not yet done."""
    return site.wait("a task", wire.take_task)


CHECK_IN = "/v1/check-in"
REQUESTS: dict[str, tuple[Callable[[Wire], dict[str, str]], str]] = {
    "unsigned": (lambda wire: {}, "unsigned"),
    "another method": (lambda wire: wire.headers("PUT", CHECK_IN, wire.check_in), "bad_signature"),
    "another path": (lambda wire: wire.headers("POST", "/v1/events", wire.check_in), "bad_signature"),
    "another body": (lambda wire: wire.headers("POST", CHECK_IN, b"{}"), "bad_signature"),
    "another key": (
        lambda wire: wire.headers("POST", CHECK_IN, wire.check_in, key=generate_key()),
        "bad_signature",
    ),
    "an hour ago": (
        lambda wire: wire.headers("POST", CHECK_IN, wire.check_in, now_s=int(time.time()) - 3600),
        "clock_off",
    ),
    "unknown device": (
        lambda wire: wire.headers("POST", CHECK_IN, wire.check_in, device_id="d-0"),
        "unknown_device",
    ),
}


@pytest.mark.parametrize(("make", "code"), REQUESTS.values(), ids=REQUESTS.keys())
def test_request_is_refused(site, wire, make: Callable[[Wire], dict[str, str]], code: str) -> None:
    """A request that its device did not sign, just so and just now, is answered 401 and changes nothing."""
    before = stored(site)
    status, body = wire.send("POST", CHECK_IN, wire.check_in, make(wire))
    refusal = decode(body, Refusal)
    assert (status, refusal.code) == (401, code)
    assert refusal.message
    assert stored(site) == before


def test_replayed_request_is_refused(site, wire) -> None:
    """The very bytes of a request that was accepted are refused the second time."""
    event = encode(DeviceEvent("hello", "once"))
    headers = wire.headers("POST", "/v1/events", event)
    assert wire.send("POST", "/v1/events", event, headers) == (204, b"")
    before = stored(site)
    status, body = wire.send("POST", "/v1/events", event, headers)
    assert (status, decode(body, Refusal).code) == (401, "replayed")
    assert stored(site) == before


def honest(workshop: Workshop, task: Task) -> tuple[Result, dict[str, np.ndarray]]:
    """A result that fits the task, and its change by flat name."""
    manifest = Package.open(workshop.package().folder, workshop.publisher_key).manifest
    specs = [manifest.slice_named(name) for name in task.slices] + [manifest.head]
    change = {name: np.full(shape, 0.01, np.float32) for name, shape in shapes(specs).items()}
    memory = MemoryReport(1 << 26, 1 << 26, 1 << 30)
    result = Result(task.task_id, task.run_id, task.round, 32, 4, 0, 1.0, 1.0, memory, "0" * 64, b"")
    return with_change(result, change), change


def with_change(result: Result, change: dict[str, np.ndarray]) -> Result:
    """The result with another change and the digest that belongs to it."""
    data = encode_values(change)
    return msgspec.structs.replace(result, change=data, change_sha256=hashlib.sha256(data).hexdigest())


def first_with(change: dict[str, np.ndarray], array: np.ndarray) -> dict[str, np.ndarray]:
    """The change with another array in its first place."""
    return {**change, next(iter(change)): array}


Values = dict[str, np.ndarray]
RESULTS: dict[str, tuple[Callable[[Result, Values], Result], int, str, str]] = {
    "nan": (
        lambda r, v: with_change(r, first_with(v, np.full_like(next(iter(v.values())), np.nan))),
        422,
        "bad_slices",
        "holds a value that is not finite",
    ),
    "another shape": (
        lambda r, v: with_change(r, first_with(v, np.zeros(3, np.float32))),
        422,
        "bad_slices",
        "is float32(3,), expected float32(1, 4, 4)",
    ),
    "unknown slice": (
        lambda r, v: with_change(r, {**v, "other/core": np.zeros(3, np.float32)}),
        422,
        "bad_slices",
        "unknown slice tensor other/core; expected",
    ),
    "missing slice": (
        lambda r, v: with_change(r, dict(list(v.items())[1:])),
        422,
        "bad_slices",
        "is missing",
    ),
    "wrong digest": (
        lambda r, v: msgspec.structs.replace(r, change_sha256="0" * 64),
        422,
        "digest_mismatch",
        "does not match its sha256; send it again",
    ),
    "another round": (
        lambda r, v: msgspec.structs.replace(r, round=r.round + 1),
        409,
        "stale",
        "is of run",
    ),
    "another task": (
        lambda r, v: msgspec.structs.replace(r, task_id="t-0"),
        400,
        "malformed",
        "a result of task t-0 was sent to task",
    ),
    "too many examples": (
        lambda r, v: msgspec.structs.replace(r, examples=33),
        422,
        "too_many_examples",
        "33 examples exceed steps times batch_size = 32",
    ),
}


@pytest.mark.parametrize(("make", "status", "code", "named"), RESULTS.values(), ids=RESULTS.keys())
def test_result_is_refused(workshop, site, wire, task, make, status: int, code: str, named: str) -> None:
    """A result that does not fit its task is answered 4xx with its reason, and leaves no trace."""
    result, change = honest(workshop, task)
    before = stored(site)
    got, body = wire.deliver(make(result, change), task.task_id)
    refusal = decode(body, Refusal)
    assert (got, refusal.code) == (status, code)
    assert named in refusal.message
    assert stored(site) == before


def test_result_is_counted_once(workshop, site, wire, task) -> None:
    """The honest result counts; sent again it is acknowledged as a duplicate, and the round has one result."""
    result, _ = honest(workshop, task)
    answers = [json.loads(wire.deliver(result, task.task_id)[1]) for _ in range(3)]
    assert [answer["status"] for answer in answers] == ["counted", "duplicate", "duplicate"]
    run = site.wait_until_finished()
    assert [(entry.results, entry.examples) for entry in run.rounds] == [(1, 32)]
    assert site.query("SELECT count(*) FROM results") == [(1,)]
