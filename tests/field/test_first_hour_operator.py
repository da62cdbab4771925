"""What people met who ran a coordinator for the first time: each situation, and what it must end in instead.

The kinds, and public threads in which others met them:

- a device that fails is asked again in every round: flwrlabs/flower#4346, TL-System/plato#176
  (tests/coordinator/rounds/test_set_aside.py, tests/coordinator/rounds/test_presence.py)
- a page of the API that is blank offline: BerriAI/litellm#5737 (tests/coordinator/api/test_schema_page.py)
- a choice that is not named in its error: missionpinball/mpf#152 (tests/edge_runtime/test_config_file.py)
- two servers on one folder: MaterializeInc/materialize#6383
- an address that nobody can open: http-party/http-server#128
- Python's objects in a message about the network: psf/requests#4189
- a run that could have been refused at once, an act that does not say on what it acted, an example that is refused,
  a revoked device that stays up: none found
"""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.api.serve import CoordinatorServer, ServeOptions, bind
from coordinator.cli import main
from coordinator.config import run_config
from edge_runtime.agent.client import Client, enrol
from edge_runtime.agent.store import IDENTITY
from edge_runtime.agent.transport import HttpTransport, Request
from edge_runtime.cli import main as edge_runtime
from edge_runtime.errors import ConfigError, UnreachableError
from edge_runtime.protocol.messages import CheckInRequest, EnrolRequest
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.conftest import ROW, World, write_package
from tests.coordinator.test_cli import write_run
from tests.edge_runtime.bigram import write_bigram
from tests.edge_runtime.protocol.test_connection_errors import write_certificate

OTHER_KEY = generate_key().public_key
#: Runs that could never give what they promise: what is changed, and what is said when they are created. ``DIR`` is a
#: folder with rows of several kinds.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a package that is not there": ({"package": "DIR/nope"}, "package names DIR/nope, which is no folder"),
    "a file for a package": ({"package": "DIR/labelled.jsonl"}, "which is no folder"),
    "a folder that is no package": ({"package": "DIR"}, "is this a package folder?"),
    "a key of somebody else": (
        {"publisher_key": OTHER_KEY},
        f"was not made over its manifest by publisher_key = {OTHER_KEY}; set publisher_key to what edge-export key",
    ),
    "rows that are not there": ({"evaluation": {"data": "DIR/nope"}}, "evaluation.data names DIR/nope"),
    "rows without labels for a classifier": (
        {"evaluation": {"data": "DIR/plain.jsonl"}},
        "evaluation.data does not fit package tiny: DIR/plain.jsonl line 1 has no label",
    ),
    "a label that the package does not know": (
        {"evaluation": {"data": "DIR/foreign.jsonl"}},
        "line 2 has a label outside the package's set of 2",
    ),
    "no rows": ({"evaluation": {"data": "DIR/empty.jsonl"}}, "DIR/empty.jsonl is empty"),
    "an arithmetic that the package lacks": (
        {"evaluation": {"data": "DIR/labelled.jsonl", "arithmetic": "row_int8"}},
        'evaluation.arithmetic = "row_int8" is not in package tiny, which has float',
    ),
}
#: The same for a package of a language model.
REFUSED_LANGUAGE_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "labelled rows": (
        {"train_head": False, "evaluation": {"data": "DIR/labelled.jsonl"}},
        "DIR/labelled.jsonl line 1 has a label, and rows of language modelling have none",
    ),
    "a head": ({}, "has no head to train: it is for language modelling; set train_head = false"),
    "a loss of classifiers": (
        {"train_head": False, "loss": "phuber"},
        'take loss = "cross_entropy"',
    ),
}


@pytest.fixture
def folder(world: World) -> Path:
    """A folder with files of rows: labelled, plain, with a label of another package, and empty."""
    (world.folder / "labelled.jsonl").write_text(ROW)
    (world.folder / "plain.jsonl").write_text('{"text": "a"}\n')
    (world.folder / "foreign.jsonl").write_text(ROW + '{"text": "a", "label": "maybe"}\n')
    (world.folder / "empty.jsonl").write_text("")
    return world.folder


def refusal(world: World, folder: Path, changed: dict[str, Any]) -> str:
    """What the operator is told of a run that cannot be; nothing is queued."""
    there = {
        key: {name: str(text).replace("DIR", str(folder)) for name, text in value.items()}
        if isinstance(value, dict)
        else value.replace("DIR", str(folder))
        if isinstance(value, str)
        else value
        for key, value in changed.items()
    }
    answer = world.admin("POST", "/v1/admin/runs", world.config(**there))
    assert answer.status_code == 422, answer.text
    assert world.admin("GET", "/v1/admin/runs").json() == []
    message = str(answer.json()["message"])
    assert "\n" not in message
    return message.replace(str(folder), "DIR")


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_be_is_refused_when_it_is_created(world: World, folder: Path, case: str) -> None:
    """Package, key and rows are compared before a run is queued, and the answer names what does not fit."""
    changed, said = REFUSED[case]
    assert said in refusal(world, folder, changed)


@pytest.mark.parametrize("case", REFUSED_LANGUAGE_MODELS)
def test_a_run_of_a_language_model_is_held_to_its_task(world: World, folder: Path, case: str) -> None:
    """Labels, a head and losses of classifiers are refused before any device or evaluation fails for them."""
    world.package = write_bigram(folder / "bigram", world.publisher).package.folder
    changed, said = REFUSED_LANGUAGE_MODELS[case]
    assert said in refusal(world, folder, changed)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[CoordinatorServer]:
    """A coordinator on a free port, in a thread of its own."""
    server = bind(ServeOptions(tmp_path / "state", port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.server.started:
        time.sleep(0.01)
    yield server
    server.stop()
    thread.join()


@pytest.fixture
def command(
    served: CoordinatorServer, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command of the operator's: exit code, output, and what it says beside it."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*words, f"--state={served.state}"])
        said = capsys.readouterr()
        return code, said.out.strip(), said.err.strip()

    return run


def test_acts_say_what_they_did(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Stopping names the run and what it was doing, and of two runs none is stopped by guess."""
    path = write_run(tmp_path)
    _, first, _ = command("run", "create", str(path))
    while "running" not in command("run", "list")[1]:
        time.sleep(0.01)
    code, second, beside = command("run", "create", str(path))
    assert (code, beside) == (0, f"note: queued behind {first} (running)")
    code, out, beside = command("run", "stop")
    assert (code, out) == (11, "")
    assert f"{first} (running), {second} (queued); say which one with --run NAME" in beside
    assert command("run", "stop", "--run", second) == (0, f"stopped run {second} (queued)", "")
    assert command("run", "stop", second) == (
        0,
        f"run {second} had ended before (stopped); nothing has changed",
        "",
    )
    assert command("run", "stop") == (0, f"stopped run {first} (running)", "")
    assert command("run", "stop", "demo")[0] == 11


def test_looks_say_what_they_took(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Show, watch, report and fetch-slices take the newest run where none is named, and say which it is."""
    path = write_run(tmp_path)
    code, _, said = command("run", "show")
    assert (code, said) == (
        22,
        "error: there is no run yet; create one with: edge-coordinator run create run.toml",
    )
    _, first, _ = command("run", "create", str(path))
    command("run", "stop")
    assert command("run", "show")[2] == ""  # nothing else could be meant
    _, second, _ = command("run", "create", str(path))
    command("run", "stop")
    slices, report = str(tmp_path / "slices"), str(tmp_path / "report")
    for words in (
        ["show"],
        ["watch"],
        ["report", f"--output={report}"],
        ["fetch-slices", f"--output={slices}"],
    ):
        _, out, said = command("run", *words)
        assert said == f"note: run {second}, the newest of 2; --run NAME takes another"
        assert second in out
        _, out, said = command("run", *words, "--run", first)
        assert said == ""
        assert first in out


def test_a_revoked_device_is_named(
    command: Callable[..., tuple[int, str, str]], served: CoordinatorServer
) -> None:
    """Revoking by id names the device, and one that nobody knows is told where to look."""
    token, key = command("token")[1], generate_key().public_key
    device_id = enrol(HttpTransport(served.url), EnrolRequest(token, "board", "generic", key)).device_id
    assert command("device", "revoke", device_id) == (0, "revoked board", "")
    code, _, said = command("device", "revoke", "board")
    assert code == 22
    assert said == "error: no device board is enrolled; list them with: edge-coordinator device list"


def test_a_device_comes_back_as_the_messages_say(
    command: Callable[..., tuple[int, str, str]],
    served: CoordinatorServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A revoked device, and one whose identity is damaged, are let in again by the steps that they are told."""

    def configure() -> str:
        path = tmp_path / "device.toml"
        path.write_text(
            f'coordinator_url = "{served.url}"\nstate_folder = "{tmp_path / "device"}"\ndata = "rows.jsonl"\n'
            f'device_name = "board"\ndevice_class = "generic"\ncap = "256M"\n'
            f'publisher_key = "{generate_key().public_key}"\nenrolment_token = "{command("token")[1]}"\n'
        )
        return str(path)

    def device(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        return edge_runtime(list(words)), capsys.readouterr().err

    (tmp_path / "rows.jsonl").write_text(ROW)
    assert device("enrol", "--config", configure())[0] == 0
    command("device", "revoke", "board")
    code, said = device("run", "--config", configure())
    assert code == 22
    told = f"to let this device back in, remove {tmp_path / 'device' / IDENTITY}, give it a new token and start it"
    assert told in said
    (tmp_path / "device" / IDENTITY).unlink()
    assert device("enrol", "--config", configure())[0] == 0
    (tmp_path / "device" / IDENTITY).write_text("{")
    code, said = device("status", "--config", configure())
    told = "have the device revoked, set a new token, and run: edge-runtime enrol"
    assert (code, told in said) == (11, True)
    code, said = device("enrol", "--config", configure())
    assert (code, "a device named board is enrolled; revoke it or choose another name" in said) == (22, True)
    command("device", "revoke", "board")
    assert device("enrol", "--config", configure())[0] == 0


def test_a_second_coordinator_is_refused(
    served: CoordinatorServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A state folder that a coordinator serves is refused to another, by a line that names the process."""
    for port in ("0", served.url.rpartition(":")[2]):  # the lock is told of before the port
        assert main(["serve", f"--state={served.state}", f"--port={port}"]) == 11
        said = capsys.readouterr().err
        assert said.startswith(f"error: another edge-coordinator uses the state folder {served.state}")
        assert f"(process {os.getpid()})" in said
        assert said.count("\n") == 1
    assert main(["run", "list", f"--state={served.state}"]) == 0


def test_a_state_folder_is_free_once_its_coordinator_has_ended(tmp_path: Path) -> None:
    """Whatever ends a coordinator, or keeps it from starting, leaves the folder to the next."""
    with pytest.raises(ConfigError, match="cannot read the TLS"):
        bind(ServeOptions(tmp_path, port=0, tls_cert=tmp_path / "no.crt", tls_key=tmp_path / "no.key"))
    with pytest.raises(ConfigError, match="is no port"):
        bind(ServeOptions(tmp_path, port=70_000))
    for _ in range(2):
        server = bind(ServeOptions(tmp_path, port=0))
        server.stop()
        server.run()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:"),  # noqa: S104 - all addresses, which is the point
        ("::", "http://[::1]:"),
        ("::1", "http://[::1]:"),
        ("localhost", "http://localhost:"),
    ],
)
def test_the_address_in_the_state_folder_can_be_used(
    tmp_path: Path, host: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands on the same machine find a coordinator that listens on all addresses, of either kind."""
    if ":" in host and not ipv6_works():
        pytest.skip("this machine has no IPv6")
    server = bind(ServeOptions(tmp_path, host=host, port=0, insecure_http=True))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.server.started:
            time.sleep(0.01)
        assert (tmp_path / "url").read_text().startswith(url)
        assert main(["run", "list", f"--state={tmp_path}"]) == 0, capsys.readouterr().err
    finally:
        server.stop()
        thread.join()


def test_commands_on_the_same_machine_know_the_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With TLS on all addresses, commands on the same machine know the coordinator by its certificate, and no other."""
    certificate, key = write_certificate(tmp_path)
    state = tmp_path / "state"
    server = bind(ServeOptions(state, host="0.0.0.0", port=0, tls_cert=certificate, tls_key=key))  # noqa: S104
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.server.started:
            time.sleep(0.01)
        assert server.url.startswith("https://127.0.0.1:")
        assert main(["run", "list", f"--state={state}"]) == 0, capsys.readouterr().err
        assert main(["run", "list", f"--state={state}", f"--ca={certificate}"]) == 21
        assert "certificate is not valid for '127.0.0.1'" in capsys.readouterr().err
        (state / "certificate.sha256").write_text("0" * 64)
        assert main(["run", "list", f"--state={state}"]) == 21
        said = capsys.readouterr().err
        assert "another certificate than the coordinator's own" in said
        assert "HTTPSConnection" not in said
    finally:
        server.stop()
        thread.join()


def ipv6_works() -> bool:
    """Whether this machine has an IPv6 loopback."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("192.0.2.1", "0.0.0.0 for all of them"),
        ("no-such-host.invalid", "--host takes an address or a name of this machine"),
    ],
)
def test_an_address_that_cannot_be_had_is_named(tmp_path: Path, host: str, said: str) -> None:
    """An address of another machine, or no address at all, is told as what it is and not as a port in use."""
    with pytest.raises(ConfigError, match=f"cannot listen on {host}.*{said}"):
        bind(ServeOptions(tmp_path, host=host, port=0, insecure_http=True))


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        (
            "http://127.0.0.1:9",
            21,
            "no answer from http://127.0.0.1:9: the connection was refused: nothing listens",
        ),
        ("http://no-such-host.invalid:8440", 21, "no such host name is known"),
        ("127.0.0.1:8440", 11, "must read http://host:port or https://host:port"),
    ],
)
def test_an_operator_is_told_who_did_not_answer(
    url: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no coordinator answers, the line has its address and what to do, and no object of Python's."""
    (tmp_path / "token").write_text("x")
    assert main(["run", "list", "--url", url, "--admin-token-file", str(tmp_path / "token")]) == code
    line = capsys.readouterr().err
    assert said in line
    assert "HTTPConnection" not in line
    assert line.count("\n") == 1


def test_a_device_is_told_who_did_not_answer() -> None:
    """The agent's messages have the coordinator's address and what to do, and no object of Python's."""
    transport = HttpTransport("http://127.0.0.1:9")
    with pytest.raises(UnreachableError) as caught:
        transport.send(Request("GET", "/"))
    transport.close()
    assert "no usable answer from http://127.0.0.1:9: the connection was refused" in str(caught.value)
    assert "HTTPConnection" not in str(caught.value)


def test_something_else_that_answers_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A web server that is no coordinator, and a file of certificates that is none, are told as such."""
    (tmp_path / "token").write_text("x")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    where = ["--url", f"http://127.0.0.1:{server.server_port}", "--admin-token-file", str(tmp_path / "token")]
    assert main(["run", "list", *where, "--ca", str(tmp_path / "no.pem")]) == 11
    assert "no.pem is no file; it must hold certificates to trust" in capsys.readouterr().err
    assert main(["run", "list", *where]) == 23
    assert f"what answers at {where[1]} (404) is no coordinator" in capsys.readouterr().err
    thread.join()
    server.server_close()


def test_devices_are_listed(command: Callable[..., tuple[int, str, str]], served: CoordinatorServer) -> None:
    """The list has name, class, state, last check-in, cap, rows and version of each device, for people and programs."""
    assert command("device", "list") == (
        0,
        "no device has enrolled; make a token with: edge-coordinator token",
        "",
    )
    transport, key = HttpTransport(served.url), generate_key()
    for name in ("board", "idle"):
        public_key = key.public_key if name == "board" else generate_key().public_key
        identity = enrol(transport, EnrolRequest(command("token")[1], name, "jetson", public_key))
        if name == "board":
            Client(transport, key, identity.device_id).check_in(CheckInRequest("0.1.0", 256 << 20, 0, 42))
    header, board, idle = command("device", "list")[1].splitlines()
    assert header.split() == ["name", "class", "state", "last", "seen", "cap", "rows", "version", "reason"]
    assert board.split()[:4] == ["board", "jetson", "ready", "0"]
    assert board.split()[-4:] == ["256.0", "MiB", "42", "0.1.0"]
    assert " ".join(idle.split()) == "idle jetson never seen"
    listed = json.loads(command("device", "list", "--json")[1])
    assert [(d["name"], d["state"], d["example_count"]) for d in listed] == [
        ("board", "ready", 42),
        ("idle", "never seen", None),
    ]
    command("device", "revoke", "idle")
    assert "revoked" in command("device", "list")[1].splitlines()[2]
    code, _, said = command("device", "resume", "board")
    assert (code, "not set aside by any run" in said) == (22, True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"selection_timeout_s": 10.0}, "selection_timeout_s = 10.0 is below poll_max_s = 15.0"),
        ({"seen_window_s": 10.0}, "seen_window_s = 10.0 is below poll_max_s = 15.0"),
        ({"poll_min_s": 20.0}, "poll_min_s = 20.0 exceeds poll_max_s = 15.0"),
    ],
)
def test_times_that_cannot_work_together_are_refused(
    world: World, folder: Path, changed: dict[str, Any], said: str
) -> None:
    """A place that ends, or a device that counts as gone, before the device may ask again is refused in one line."""
    assert said in refusal(world, folder, {"selection_timeout_s": 15.0, "poll_max_s": 15.0, **changed})


def test_times_follow_from_one_another(world: World) -> None:
    """Where only the poll window is set, places wait long enough for it."""
    config = world.config(poll_min_s=20.0, poll_max_s=60.0)
    del config["selection_timeout_s"]
    assert run_config(config).selection_s == 240.0
    assert run_config({**config, "poll_min_s": 0.1, "poll_max_s": 1.0}).selection_s == 60.0


def test_a_new_user_gets_from_package_to_run(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """run new and run create, one after the other as the first one says, need nothing in between."""
    key = generate_key()
    write_package(tmp_path / "package", key)
    (tmp_path / "dev.jsonl").write_text(ROW)
    words = ["run", "new", str(tmp_path / "package"), "--publisher-key", key.public_key]
    path = str(tmp_path / "run.toml")
    assert main([*words, "--evaluation-data", str(tmp_path / "dev.jsonl"), "--output", path]) == 0
    said = capsys.readouterr().out.strip()
    assert said == f"wrote {path}; look it through, then: edge-coordinator run create {path}"
    code, run_id, beside = command(*said.partition("edge-coordinator ")[2].split())
    assert (code, beside) == (0, "")
    assert run_id.startswith("tiny-")
    assert main([*words, "--output", path]) == 11
    assert "exists; choose another --output" in capsys.readouterr().err
