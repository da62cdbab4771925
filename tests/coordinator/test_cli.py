"""The command line and a real server on loopback: uvicorn, sockets, the device runtime's own client."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3

from coordinator.admin.client import AdminClient
from coordinator.api.admin_api import ReleaseRequest
from coordinator.api.serve import CoordinatorServer, ServeOptions, bind
from coordinator.cli import main
from coordinator.rounds import evaluation, state_machine
from coordinator.rounds.summary import ReleaseSummary
from edge_runtime.agent.client import Client, enrol
from edge_runtime.agent.transport import HttpTransport
from edge_runtime.errors import ConfigError, RefusedError, ResourceError
from edge_runtime.package.manifest import parse_manifest
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    CheckInRequest,
    EnrolRequest,
    MemoryReport,
    ResultReceipt,
    SignedTask,
    Task,
)
from edge_runtime.protocol.signing import generate_key
from edge_runtime.worker.jobs import EvaluateOutcome
from tests.coordinator.conftest import ROW, SPECS, FakeDevice, World, write_package
from tests.edge_runtime.protocol.test_connection_errors import write_certificate


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CoordinatorServer]:
    """A coordinator that serves on a free port in a thread of its own; evaluations answer at once."""

    def finish(process: object, kind: object) -> EvaluateOutcome:
        return EvaluateOutcome(10, 0.75, 0.5, 1.0, MemoryReport(1, 1, 1))

    monkeypatch.setattr(evaluation, "start_worker", lambda job: None)
    monkeypatch.setattr(evaluation, "finish_worker", finish)
    server = bind(ServeOptions(tmp_path / "state", port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.server.started:
        time.sleep(0.01)
    yield server
    server.stop()
    thread.join()


class Fleet:
    """Real clients over real sockets; training is the fake device's formula."""

    def __init__(self, url: str, names: list[str], token: Any) -> None:
        self.clients: dict[str, Client] = {}
        for name in names:
            key = generate_key()
            transport = HttpTransport(url)
            identity = enrol(transport, EnrolRequest(token(), name, "generic", key.public_key))
            self.clients[name] = Client(transport, key, identity.device_id)

    def work_until_finished(self, folder: Path) -> None:
        """Check in, fetch, deliver, until the coordinator says that the run is over."""
        finished: set[str] = set()
        deadline = time.monotonic() + 30
        while len(finished) < len(self.clients) and time.monotonic() < deadline:
            for name, client in self.clients.items():
                answer = client.check_in(CheckInRequest("test", 1 << 30, 0, 10))
                if isinstance(answer, SignedTask):
                    task = messages.decode(answer.task.encode(), Task)
                    part = folder / f"{name}-{task.task_id}"
                    part.unlink(missing_ok=True)
                    client.fetch_blob(task.package, part, max_bytes=1 << 20)
                    parse_manifest(part.read_bytes())
                    result = FakeDevice.result(_Trainer(name), task)  # type: ignore[arg-type]
                    client.put_result(task.task_id, messages.encode_result(result))
                elif getattr(answer, "reason", "") == "run finished":
                    finished.add(name)
            time.sleep(0.02)
        assert len(finished) == len(self.clients)


class _Trainer:
    """What FakeDevice.result needs of a device."""

    cap_bytes = 1 << 30
    specs = SPECS

    def __init__(self, name: str) -> None:
        self.name = name


def write_run(folder: Path) -> Path:
    """A run.toml beside a package."""
    key = generate_key()
    write_package(folder / "package", key)
    (folder / "dev.jsonl").write_text(ROW)
    path = folder / "run.toml"
    path.write_text(
        f"""
        name = "demo"
        package = "package"
        publisher_key = "{key.public_key}"
        seed = 1
        rounds = 3
        devices_per_round = 2
        min_devices = 3
        min_results = 2
        steps = 3
        batch_size = 4
        poll_min_s = 0.05
        poll_max_s = 0.1
        [evaluation]
        data = "dev.jsonl"
        """
    )
    return path


def test_a_run_from_the_command_line(
    server: CoordinatorServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token, run, watch, show, report and slices, against devices that speak HTTP."""
    state = f"--state={server.state}"

    def command(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments, state]) == 0
        return capsys.readouterr().out.strip()

    fleet = Fleet(server.url, ["a", "b", "c"], lambda: command("token"))
    run_id = command("run", "create", str(write_run(tmp_path)))
    fleet.work_until_finished(tmp_path)

    watched = command("run", "watch")
    names = " ".join(watched.splitlines()[0].split())
    assert names == "round accuracy loss up up a task down time peak predicted peak measured"
    assert len({len(line) for line in watched.splitlines()[:4]}) == 1
    assert watched.splitlines()[-1].startswith(f"{run_id}: finished")
    assert len(watched.splitlines()) == 5
    assert "75.0 %" in command("run", "show", run_id)
    assert run_id in command("run", "list")

    command("run", "report", "--output", str(tmp_path / "report"))
    report = json.loads((tmp_path / "report/report.json").read_bytes())
    state_machine = report["run"]["rounds"]
    assert [entry["accuracy"] for entry in state_machine] == [0.75] * 3
    assert all(entry["bytes_up"] > 500 and entry["bytes_down"] > 1000 for entry in state_machine)
    assert all(len(entry["devices"]) == 2 for entry in state_machine)
    assert (tmp_path / "report/curve.svg").read_text().startswith("<?xml")
    assert run_id in (tmp_path / "report/report.txt").read_text()

    command("run", "fetch-slices", "--output", str(tmp_path / "final.safetensors"))
    assert (tmp_path / "final.safetensors").stat().st_size > 100
    assert command("device", "revoke", "a") == "revoked a"


def serve_process(state: Path, port: int) -> subprocess.Popen[str]:
    """``edge-coordinator serve`` as a process of its own, once it answers."""
    command = [sys.executable, "-m", "coordinator.cli", "serve", f"--state={state}", f"--port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("coordinator at http://127.0.0.1:")
    return process


def answers(url: str) -> bool:
    """Whether a coordinator serves there already."""
    try:
        return urllib3.request("GET", f"{url}/healthz", retries=False).status == 200
    except urllib3.exceptions.HTTPError:
        return False


def test_log_lines_are_json_where_they_are_asked_for(tmp_path: Path) -> None:
    """Every line on standard error of ``serve --log-format json`` is a JSON object with an event."""
    command = [sys.executable, "-m", "coordinator.cli", "serve", "--log-format", "json", "--port", "0"]
    command += ["--state", str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        first = json.loads(process.stderr.readline())
        while not answers(first["url"]):
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 0
        rest = [json.loads(line) for line in process.stderr]
    assert first["event"] == "serving"
    assert first["url"].startswith("http://127.0.0.1:")
    assert all("event" in line for line in rest)


def test_killed_while_a_result_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After ``kill -9`` in the middle of a round, the next start knows tasks and results, and finishes."""
    state = tmp_path / "state"

    def command(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments, f"--state={state}"]) == 0
        return capsys.readouterr().out.strip()

    def check_in(client: Client) -> Task | None:
        answer = client.check_in(CheckInRequest("test", 1 << 30, 0, 10))
        return messages.decode(answer.task.encode(), Task) if isinstance(answer, SignedTask) else None

    process = serve_process(state, 0)
    try:
        url = (state / "url").read_text().strip()
        fleet = Fleet(url, ["a", "b", "c"], lambda: command("token"))
        path = write_run(tmp_path)
        path.write_text(path.read_text().partition("[evaluation]")[0])
        command("run", "create", str(path))
        tasks: dict[str, Task] = {}
        while len(tasks) < 2:
            asked = {name: check_in(client) for name, client in fleet.clients.items()}
            tasks = {name: task for name, task in asked.items() if task is not None}
        first, second = tasks
        body = messages.encode_result(FakeDevice.result(_Trainer(first), tasks[first]))  # type: ignore[arg-type]
        assert fleet.clients[first].put_result(tasks[first].task_id, body) == ResultReceipt("counted")

        process.kill()
        process.communicate()
        process = serve_process(state, int(url.rpartition(":")[2]))

        assert fleet.clients[first].put_result(tasks[first].task_id, body) == ResultReceipt("duplicate")
        assert check_in(fleet.clients[second]) == tasks[second]
        fleet.work_until_finished(tmp_path)
        assert "finished" in command("run", "show")
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_crashed_loop_stops_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error nobody foresaw ends the process instead of leaving it deaf."""

    def broken(*_: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(state_machine, "play", broken)
    server = bind(ServeOptions(tmp_path / "state", port=0))
    server.run()
    assert server.crashed


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors go to standard error as one line, with the error's exit code."""
    assert main(["run", "show", "--state", str(tmp_path)]) == ConfigError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: cannot read")
    token = tmp_path / "token"
    token.write_text("x")
    assert main(["run", "show", "--url", "http://127.0.0.1:9", "--admin-token-file", str(token)]) == 21
    assert capsys.readouterr().err.startswith("error: no answer from http://127.0.0.1:9")


def test_refusals_reach_the_operator(
    server: CoordinatorServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run the coordinator cannot take, and a run it does not know, are explained."""
    path = write_run(tmp_path)
    (tmp_path / "package/tokenizer.json").write_bytes(b"[]")
    assert main(["run", "create", str(path), "--state", str(server.state)]) == 22
    assert "tokenizer.json does not match the sha256" in capsys.readouterr().err
    assert main(["run", "show", "other", "--state", str(server.state)]) == 22
    assert "no run other" in capsys.readouterr().err


def test_state_is_private(server: CoordinatorServer) -> None:
    """Keys and the admin token are readable by their owner only."""
    assert (server.state / "admin.token").stat().st_mode & 0o777 == 0o600
    assert (server.state / "task.key").stat().st_mode & 0o777 == 0o600
    with urllib3.PoolManager() as pool:
        assert pool.request("GET", f"{server.url}/healthz").json() == {"status": "ok"}
        document = pool.request("GET", f"{server.url}/schema/openapi.json").json()
    assert {"CheckInRequest", "SignedTask", "Result"} <= set(document["components"]["schemas"])


def test_admin_needs_the_token(world: World) -> None:
    """Without the operator's token every admin request is refused."""
    for token in ("", "Bearer", "Bearer wrong", f"Basic {world.app.state.app_state.admin_token}"):
        answer = world.client.get("/v1/admin/runs", headers={"Authorization": token})
        assert (answer.status_code, answer.json()["code"]) == (401, "not_admin")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org"])  # noqa: S104 - refused, which is the point
def test_plain_http_needs_a_word(tmp_path: Path, host: str) -> None:
    """An address that is not loopback is refused without TLS, unless the operator says so aloud."""
    with pytest.raises(ConfigError, match="--insecure-http"):
        bind(ServeOptions(tmp_path / "state", host=host, port=0))
    assert not (tmp_path / "state").exists()


def test_insecure_http_said_aloud(tmp_path: Path) -> None:
    """With --insecure-http the server binds anywhere."""
    server = bind(ServeOptions(tmp_path / "state", host="0.0.0.0", port=0, insecure_http=True))  # noqa: S104
    server.listener.close()
    server.lock.close()


def test_half_a_certificate(tmp_path: Path) -> None:
    """A certificate without its key is refused."""
    with pytest.raises(ConfigError, match="belong together"):
        bind(ServeOptions(tmp_path / "state", tls_cert=tmp_path / "cert.pem"))


def test_port_taken(tmp_path: Path, server: CoordinatorServer) -> None:
    """A port in use is named."""
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        bind(ServeOptions(tmp_path / "other", port=port))


def test_a_server_is_bound_as_its_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``serve`` listens with the certificate it is given, and without one on all addresses only if told so aloud."""
    monkeypatch.setattr(
        CoordinatorServer, "run", lambda server: (server.listener.close(), server.lock.close())
    )
    certificate, key = write_certificate(tmp_path)
    serve = ["serve", "--state", str(tmp_path / "state"), "--host", "0.0.0.0", "--port", "0"]  # noqa: S104
    assert main(serve) == ConfigError.exit_code
    refused = capsys.readouterr().err
    assert "give --tls-cert and --tls-key, or --insecure-http" in refused
    assert main([*serve, "--tls-cert", str(certificate), "--tls-key", str(key)]) == 0
    assert capsys.readouterr().out.startswith("coordinator at https://127.0.0.1:")
    assert main([*serve, "--insecure-http"]) == 0
    assert capsys.readouterr().out.startswith("coordinator at http://127.0.0.1:")


#: Every command that asks a coordinator, with what else it must be given.
ASKING = [
    *(
        "status",
        "token",
        "device revoke a",
        "device resume a",
        "device list",
        "run create run.toml",
        "run list",
    ),
    *("release publish", "release list", "user list", "user remove a", "audit"),
    *("run show", "run watch", "run stop", "run report --output out", "run fetch-slices --output out"),
    "run export --events out",
]


def test_users_are_added_listed_and_removed(
    server: CoordinatorServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user with a role gets a token, which works as far as the role goes; the audit log tells who did what."""
    at = ["--state", str(server.state)]
    assert main(["user", "list", *at]) == 0
    assert "user add NAME" in capsys.readouterr().out
    assert main(["user", "add", "ann", "--role", "viewer", *at]) == 0
    token = tmp_path / "token"
    token.write_text(capsys.readouterr().out)
    (tmp_path / "password").write_text("long enough, really\n")
    with_password = [
        "user",
        "add",
        "bob",
        "--role",
        "operator",
        "--password-file",
        str(tmp_path / "password"),
    ]
    assert main([*with_password, *at]) == 0
    assert capsys.readouterr().out == "added bob, operator\n"
    (tmp_path / "password").write_text("short")
    assert main([*with_password[:2], "eve", *with_password[3:], *at]) == 22
    assert "12 to 256 characters" in capsys.readouterr().err
    assert main([*with_password[:-1], str(tmp_path / "none"), *at]) == ConfigError.exit_code
    assert "cannot read --password-file" in capsys.readouterr().err
    assert main(["user", "list", "--json", *at]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(user["name"], user["role"], user["signs_in_by"]) for user in listed] == [
        ("ann", "viewer", "token"),
        ("bob", "operator", "password"),
    ]
    as_ann = ["--url", server.url, "--admin-token-file", str(token)]
    assert main(["run", "list", *as_ann]) == 0
    assert main(["token", *as_ann]) == 22
    assert "ann is viewer, and this needs the role operator" in capsys.readouterr().err
    assert main(["user", "remove", "ann", *at]) == 0
    assert main(["run", "list", *as_ann]) == 22
    capsys.readouterr()
    assert main(["audit", "--limit", "2", *at]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3:] for line in lines[1:]] == [
        ["admin.token", "remove", "a", "user", "ann", "done"],
        ["ann", "make", "an", "enrolment", "token", "no_right", *lines[2].split()[9:]],
    ]
    assert main(["audit", "--json", *at]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 5


@pytest.mark.parametrize("words", ASKING)
def test_every_command_asks_the_coordinator_that_is_named(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a state folder, or an address and a token file, lead to nobody, each command says so and writes nothing."""
    monkeypatch.chdir(tmp_path)
    path = write_run(tmp_path)
    (tmp_path / "token").write_text("x")
    command = [str(path) if word == "run.toml" else word for word in words.split()]
    state = tmp_path / "nothing"
    assert main([*command, "--state", str(state)]) == ConfigError.exit_code
    assert str(state) in capsys.readouterr().err
    assert main([*command, "--url", "http://127.0.0.1:9", "--admin-token-file", "token"]) == 21
    assert "no answer from http://127.0.0.1:9" in capsys.readouterr().err
    assert main([*command, "--url", "http://127.0.0.1:9"]) == ConfigError.exit_code
    assert "--admin-token-file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        "show",
        "watch",
        "stop",
        "pause",
        "resume",
        "rollback --to 0",
        "report --output out",
        "fetch-slices --output out",
        "export --events out",
    ],
)
def test_a_run_is_named_with_and_without_the_option(
    server: CoordinatorServer,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``--run NAME`` is the same as NAME; two different names are refused."""
    monkeypatch.chdir(tmp_path)
    command = ["run", *words.split(), "--state", str(server.state)]
    for named in (["--run", "lost"], ["lost"], ["--run", "lost", "lost"]):
        assert main([*command, *named]) == 22
        assert "no run lost" in capsys.readouterr().err
    assert main([*command, "--run", "lost", "found"]) == ConfigError.exit_code
    assert "lost" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_trouble_that_passes_has_a_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A coordinator that starts on a full disk says so, and ends with the code that its unit tries again."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert main(["serve", "--state", str(tmp_path / "state"), "--port", "0"]) == ResourceError.exit_code
    assert "no space left on device; make room, or wait and start again" in capsys.readouterr().err


def test_a_release_is_asked_for_and_listed(
    server: CoordinatorServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``release publish`` hands on run, round, limits and whether each round follows; the list is JSON if asked for."""
    asked: list[object] = []

    def publish(client: AdminClient, request: ReleaseRequest) -> ReleaseSummary:
        asked.append(request)
        return ReleaseSummary(
            1, request.run_id, 2, "0" * 64, request.lowest_accuracy, request.highest_loss, 0.0, 0
        )

    monkeypatch.setattr(AdminClient, "publish", publish)
    state = ["--state", str(server.state)]
    assert main(["run", "create", str(write_run(tmp_path)), *state]) == 0
    run_id = capsys.readouterr().out.strip()
    limits = ["--round", "2", "--lowest-accuracy", "0.5", "--highest-loss", "1.5", "--each-round"]
    assert main(["release", "publish", "--run", run_id, *limits, *state]) == 0
    assert asked == [ReleaseRequest(run_id, 2, 0.5, 1.5, each_round=True)]
    assert capsys.readouterr().out.startswith(f"published release 1: run {run_id} after round 2")
    assert main(["release", "list", "--json", *state]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_token_is_valid_as_long_as_it_says(
    server: CoordinatorServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """--valid-s sets when a token expires; afterwards enrolling is refused, and an absurd time is too."""
    state = ["--state", str(server.state)]
    assert main(["token", "--valid-s", "0.001", *state]) == 0
    token = capsys.readouterr().out.strip()
    time.sleep(0.01)
    request = EnrolRequest(token, "late", "generic", generate_key().public_key)
    with pytest.raises(RefusedError, match="expired"):
        enrol(HttpTransport(server.url), request)
    assert main(["token", "--valid-s", "-1", *state]) == 22
    assert "valid_s" in capsys.readouterr().err
