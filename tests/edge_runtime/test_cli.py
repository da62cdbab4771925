import re
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest

from edge_runtime import __version__, cli
from edge_runtime.agent.store import Store
from edge_runtime.protocol.messages import ComeBack, EnrolResponse, Refusal, encode
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.golden.generate import FOLDER

COORDINATOR_KEY = generate_key().public_key


class Stub(BaseHTTPRequestHandler):
    """A coordinator that enrols anyone, has no work, and knows no blob."""

    off_s = 0.0
    accepts = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/devices/enrol":
            self.answer(201, encode(EnrolResponse("d-7", COORDINATOR_KEY)))
        else:
            self.answer(200, encode(ComeBack(3600.0, 3600.0)))

    def do_GET(self) -> None:
        if self.accepts:
            self.answer(404, encode(Refusal("unknown_blob", "no such blob")))
        else:
            self.answer(403, encode(Refusal("revoked", "this device was revoked")))

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The date header, as far off as a test asks for."""
        import time

        return formatdate(time.time() - self.off_s, usegmt=True)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def url() -> Iterator[str]:
    """The address of a stub coordinator."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def write_config(folder: Path, url: str, extra: str = "") -> str:
    (folder / "data.jsonl").write_text('{"text": "fine", "label": "positive"}\n')
    path = folder / "device.toml"
    path.write_text(
        f'coordinator_url = "{url}"\nstate_folder = "state"\ndata = "data.jsonl"\ndevice_name = "board-1"\n'
        f'device_class = "generic"\npublisher_key = "{generate_key().public_key}"\ncap = "256M"\n'
        f'enrolment_token = "one-time-token-0001"\ndisk_quota = "1M"\n{extra}'
    )
    return str(path)


def test_enrol_then_status_and_check(tmp_path, url, capsys) -> None:
    """The three commands an operator runs by hand work in this order and agree on who the device is."""
    config = write_config(tmp_path, url)
    assert cli.main(["enrol", "--config", config]) == 0
    assert f"enrolled as d-7; tasks must be signed by {COORDINATOR_KEY}" in capsys.readouterr().out
    store = Store(tmp_path / "state", disk_quota_bytes=1 << 20)
    store.keep_pending((FOLDER / "Result.msgpack").read_bytes())
    assert cli.main(["status", "--config", config]) == 0
    assert re.search(r"enrolled +d-7\n(.*\n)*pending +result of task t-1", capsys.readouterr().out)
    assert cli.main(["check", "--config", config]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "config:", "data:", "engine:", "cap:", "disk:", "key:", "enrolment:", "coordinator:", "clock:"
    ]  # fmt: skip
    assert all(line.startswith("ok ") for line in lines)


def test_a_damaged_identity_is_set_aside_on_command(tmp_path, url, capsys) -> None:
    """The agent does not enrol again by itself; ``enrol`` does, and keeps what was damaged."""
    config = write_config(tmp_path, url)
    assert cli.main(["enrol", "--config", config]) == 0
    place = tmp_path / "state" / "identity.json"
    place.write_bytes(b"\x00" * 40)
    for command in ("run", "status", "check"):
        assert cli.main([command, "--config", config]) == 11
        told = capsys.readouterr()
        assert "set a new token, and run: edge-runtime enrol" in told.err + told.out
    assert place.read_bytes() == b"\x00" * 40
    assert cli.main(["enrol", "--config", config]) == 0
    assert "is kept as" in capsys.readouterr().err
    assert place.with_name("identity.json.damaged").read_bytes() == b"\x00" * 40
    assert cli.main(["status", "--config", config]) == 0


def test_check_works_before_enrolment(tmp_path, url, capsys) -> None:
    """A fresh device that has a token is fit to serve, and checking makes no key."""
    assert cli.main(["check", "--config", write_config(tmp_path, url)]) == 0
    out = capsys.readouterr().out
    assert "not enrolled yet" in out
    assert "ok coordinator: answers; it will know this device once it is enrolled" in re.sub(" +", " ", out)
    assert not (tmp_path / "state" / "device.key").exists()


def test_status_before_enrolment_says_so(tmp_path, capsys) -> None:
    """A fresh device has no identity and no pending result, and status needs no network."""
    assert cli.main(["status", "--config", write_config(tmp_path, "http://127.0.0.1:9")]) == 0
    assert re.search(r"enrolled +no\n(.*\n)*pending +nothing", capsys.readouterr().out)


def test_a_device_without_its_engine_does_not_start(tmp_path, capsys, monkeypatch) -> None:
    """Where the engine is not installed, ``run`` ends at once with the install command, and ``check`` finds it."""
    config = write_config(tmp_path, "http://127.0.0.1:9", 'engine = "executorch"\n')
    installed = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: installed("no such thing" if name == "executorch" else name)
    )
    assert cli.main(["run", "--config", config]) == 11
    assert "pip install 'edge-runtime[executorch]'" in capsys.readouterr().err
    assert cli.main(["check", "--config", config]) == 11
    assert re.search(r"failed engine: engine executorch is not installed", capsys.readouterr().out)


def test_check_goes_on_after_a_failure(tmp_path, capsys) -> None:
    """Every finding is reported, and the exit code is that of the first failure."""
    config = write_config(tmp_path, "http://127.0.0.1:9")
    (tmp_path / "data.jsonl").write_text("nonsense\n")
    assert cli.main(["check", "--config", config]) == 12
    out = capsys.readouterr().out
    assert re.search(r"failed data: .*line 1 ", out)
    assert re.search(r"failed coordinator: .*check the address", out)
    assert "clock: not compared" in out


@pytest.mark.parametrize("enrolled", [False, True])
@pytest.mark.parametrize("status", [200, 404, 401])
def test_check_tells_another_server_from_a_coordinator(
    tmp_path, url, capsys, monkeypatch, enrolled: bool, status: int
) -> None:
    """Whatever status a web server answers with, it is no coordinator unless it refuses as one does."""
    config = write_config(tmp_path, url)
    if enrolled:
        cli.main(["enrol", "--config", config])
    monkeypatch.setattr(Stub, "do_GET", lambda stub: stub.answer(status, b"<html>welcome</html>"))
    assert cli.main(["check", "--config", config]) == 21
    out = capsys.readouterr().out
    assert f"failed coordinator: {url} answers with status {status}, but not as a coordinator does" in out


@pytest.mark.parametrize(
    ("attribute", "value", "named", "code"),
    [("off_s", 1000.0, "failed clock", 10), ("accepts", False, "failed coordinator", 22)],
)
def test_check_finds_what_the_coordinator_would_refuse(
    tmp_path, url, capsys, monkeypatch, attribute: str, value: object, named: str, code: int
) -> None:
    """A clock that is off and a revoked device are found before a task is lost to them."""
    config = write_config(tmp_path, url)
    cli.main(["enrol", "--config", config])
    monkeypatch.setattr(Stub, attribute, value)
    assert cli.main(["check", "--config", config]) == code
    assert named in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "named", "code"),
    [('cap = "1M"\n', "failed cap", 10), ('disk_quota = "900T"\n', "failed disk", 10)],
)
def test_check_finds_limits_that_cannot_hold(
    tmp_path, url, capsys, extra: str, named: str, code: int
) -> None:
    """A cap no engine loads in, and a quota the disk does not have, are found with figures."""
    config = write_config(tmp_path, url)
    key = extra.split(" ", 1)[0]
    text = Path(config).read_text()
    Path(config).write_text(re.sub(rf"^{key} = .*\n", extra, text, flags=re.MULTILINE))
    assert cli.main(["check", "--config", config]) == code
    assert named in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "enrol", "check", "status"])
def test_an_error_is_one_line_and_an_exit_code(tmp_path, capsys, command: str) -> None:
    """A configuration that cannot be read ends every command with one line and no traceback."""
    assert cli.main([command, "--config", str(tmp_path / "none.toml")]) == 11
    assert re.fullmatch(r"error: cannot read the configuration .*none\.toml: .*\n", capsys.readouterr().err)


def test_an_unreachable_coordinator_has_its_own_exit_code(tmp_path, capsys) -> None:
    """Enrolling without a network ends with the code that means: try again later."""
    assert cli.main(["enrol", "--config", write_config(tmp_path, "http://127.0.0.1:9")]) == 21
    assert capsys.readouterr().err.count("\n") == 1


def test_the_version_is_told(capsys) -> None:
    """--version prints the runtime's version."""
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"edge-runtime {__version__}\n"


def test_a_command_is_needed(capsys) -> None:
    """Without a command argparse explains the usage and ends with 2."""
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_an_interrupted_command_says_so_to_the_shell(tmp_path, capsys, monkeypatch) -> None:
    """Ctrl-C ends a command without a traceback, and with the exit code that shells know for it."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "identity", interrupted)
    assert cli.main(["status", "--config", write_config(tmp_path, "http://127.0.0.1:9")]) == 130
    assert capsys.readouterr().err == ""
