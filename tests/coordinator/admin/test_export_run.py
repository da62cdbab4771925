"""A run's course as other tools read it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from coordinator import cli
from tests.coordinator.conftest import World


class Mlflow(BaseHTTPRequestHandler):
    """Answers as MLflow's REST API 2.0 is documented; it has no experiment yet."""

    asked: ClassVar[list[tuple[str, Any]]] = []

    def do_GET(self) -> None:
        """No such experiment."""
        self.asked.append((self.path, None))
        self._answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})

    def do_POST(self) -> None:
        """Take what comes."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path.removeprefix("/api/2.0/mlflow/"), body))
        self._answer(
            200, {"experiment_id": "7", "run": {"info": {"run_id": "made"}}} if "create" in self.path else {}
        )

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def mlflow() -> Iterator[str]:
    """Address of a tracking server."""
    Mlflow.asked = []
    with HTTPServer(("127.0.0.1", 0), Mlflow) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def export(*options: object) -> int:
    """The command."""
    return cli.main(["run", "export", "--state", "s", *map(str, options)])


def test_events_are_one_object_a_line(finished: World, tmp_path: Path) -> None:
    """Both rounds and every event of the run are there, in order, and no row's text."""
    assert (
        cli.main(
            ["run", "export", "--state", "s", "--run", "tiny", "--events", str(tmp_path / "events.jsonl")]
        )
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    events = [line for line in lines if line["kind"] == "event"]
    assert [entry["state"] for entry in rounds] == ["committed", "committed"]
    assert [event["event_id"] for event in events] == sorted(event["event_id"] for event in events)
    shown = finished.admin("GET", "/v1/admin/runs/latest/events").json()
    assert len(events) == len(shown)


def test_a_tracking_server_gets_a_run(finished: World, mlflow: str) -> None:
    """An experiment of the run's name, its settings as parameters, its figures by round, and how it ended."""
    assert cli.main(["run", "export", "--state", "s", "--mlflow", mlflow]) == 0
    asked = dict(Mlflow.asked)
    run = finished.run()
    assert asked["runs/create"]["run_name"] == run["run_id"]
    assert asked["runs/update"]["status"] == "FINISHED"
    batches = [body for path, body in Mlflow.asked if path == "runs/log-batch"]
    metrics = {(m["key"], m["step"]): m["value"] for body in batches for m in body.get("metrics", [])}
    params = {p["key"]: p["value"] for body in batches for p in body.get("params", [])}
    assert params["rounds"] == "2"
    assert metrics["devices/results", 2] == run["rounds"][1]["results"]


def test_what_is_no_tracking_server_is_told(finished: World, capsys: pytest.CaptureFixture[str]) -> None:
    """A port where nobody listens is one line and a code that says waiting may help."""
    assert export("--mlflow", "http://127.0.0.1:9") == 21
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot reach an MLflow server" in line


def test_an_export_to_nowhere_is_refused(finished: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any destination nothing is asked of the coordinator."""
    assert export() == 11
    assert "--events, --tensorboard" in capsys.readouterr().err
