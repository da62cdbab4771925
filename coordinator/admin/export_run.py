"""A run's course for other tools: JSON lines, TensorBoard's event files, an MLflow server."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import urllib3

from coordinator.rounds.summary import EventSummary, RoundSummary, RunSummary
from edge_runtime.durable import write_durably
from edge_runtime.errors import ConfigError, ProtocolError, RefusedError, UnreachableError

#: Standard output instead of a file.
STDOUT = Path("-")
#: Most metrics in one request (MLflow REST API, runs/log-batch).
MLFLOW_BATCH = 1000
MLFLOW_TIMEOUT_S = 30.0


def write_events(run: RunSummary, events: Iterable[EventSummary], output: Path) -> int:
    """Write rounds and events as JSON lines: what a round came to, then each event in the order in which it happened.

    Args:
        run: run to write.
        events: events of the run.
        output: file to write; ``-`` is standard output.

    Returns:
        number of lines.
    """
    encode = msgspec.json.encode
    lines = [
        encode({"kind": "round", "run_id": run.run_id, **msgspec.to_builtins(entry)}) for entry in run.rounds
    ]
    lines += [
        encode({"kind": "event", "run_id": run.run_id, **msgspec.to_builtins(event)}) for event in events
    ]
    data = b"".join(line + b"\n" for line in lines)
    if output == STDOUT:
        sys.stdout.write(data.decode())
    else:
        write_durably(output, data)
    return len(lines)


def write_tensorboard(run: RunSummary, folder: Path) -> int:
    """Write a run's scalars as an event file in ``folder/<run_id>``.

    Returns:
        number of scalars.

    Raises:
        ConfigError: TensorBoard's writer is not installed, or the folder has such a file already.
    """
    try:
        from tensorboardX import SummaryWriter  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError("--tensorboard needs: pip install 'edge-runtime[tensorboard]'") from error
    place = folder / run.run_id
    if any(place.glob("events.out.tfevents.*")):
        raise ConfigError(f"{place} has the events of this run already; remove it, or name another folder")
    count = 0
    with SummaryWriter(str(place), write_to_disk=True) as writer:
        writer.add_text("config", f"```json\n{msgspec.json.encode(run.config).decode()}\n```", 0)
        for name, step, at_s, value in scalars(run):
            writer.add_scalar(name, value, step, walltime=at_s)
            count += 1
    return count


def send_to_mlflow(run: RunSummary, url: str) -> str:
    """Make a run with parameters and metrics on an MLflow tracking server (its REST API 2.0).

    Args:
        run: run to send; its name becomes the experiment's.
        url: address of the server.

    Returns:
        id of the run that was made there.

    Raises:
        UnreachableError: the server cannot be reached.
        RefusedError: it refuses; names the request.
        ProtocolError: it is no MLflow server.
    """
    client = _Mlflow(url)
    experiment = client.experiment(run.name or "edge-coordinator")
    started_ms = int((run.started_s or run.created_s) * 1000)
    made = client.ask(
        "runs/create",
        {
            "experiment_id": experiment,
            "run_name": run.run_id,
            "start_time": started_ms,
            "tags": [
                {"key": "mlflow.runName", "value": run.run_id},
                {"key": "package_sha256", "value": run.package_sha256},
                {"key": "values_sha256", "value": run.values_sha256},
            ],
        },
    )
    run_id = str(made["run"]["info"]["run_id"])
    settings = msgspec.to_builtins(run.config)
    params = [
        {"key": key, "value": str(value)[:6000]} for key, value in settings.items() if value is not None
    ]
    for start in range(0, len(params), 100):
        client.ask("runs/log-batch", {"run_id": run_id, "params": params[start : start + 100]})
    metrics = [
        {"key": name, "value": value, "timestamp": int(at_s * 1000), "step": step}
        for name, step, at_s, value in scalars(run)
    ]
    for start in range(0, len(metrics), MLFLOW_BATCH):
        client.ask("runs/log-batch", {"run_id": run_id, "metrics": metrics[start : start + MLFLOW_BATCH]})
    status = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}.get(run.state)
    if status is not None:
        ended_ms = int((run.finished_s or run.created_s) * 1000)
        client.ask("runs/update", {"run_id": run_id, "status": status, "end_time": ended_ms})
    return run_id


def scalars(run: RunSummary) -> Iterator[tuple[str, int, float, float]]:
    """What is plotted of a run: name, round (from 1; 0 is before the first), seconds since 1970, value.

    Rounds that were taken back are left out, and values that were not measured.
    """
    begun_s = run.started_s or run.created_s
    for name, value in (("accuracy", run.initial_accuracy), ("loss", run.initial_loss)):
        if value is not None:
            yield f"evaluation/{name}", 0, begun_s, value
    passed_s = begun_s
    for entry in run.counting:
        passed_s += entry.seconds or 0.0
        for name, value in _figures(entry):
            if value is not None and math.isfinite(value):
                yield name, entry.round + 1, passed_s, float(value)


def _figures(entry: RoundSummary) -> Iterator[tuple[str, float | None]]:
    yield "evaluation/accuracy", entry.accuracy
    yield "evaluation/loss", entry.loss
    yield "evaluation/perplexity", entry.perplexity
    yield "devices/train_loss", entry.train_loss
    yield "devices/results", entry.results
    yield "devices/refused", entry.refused
    yield "devices/failed", entry.failed
    yield "memory/predicted_peak_bytes", entry.predicted_peak_bytes
    yield "memory/measured_peak_bytes", entry.measured_peak_bytes
    yield "traffic/bytes_up", entry.bytes_up
    yield "traffic/bytes_down", entry.bytes_down
    yield "round/seconds", entry.seconds


class _Mlflow:
    """What is asked of an MLflow tracking server."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._pool = urllib3.PoolManager(retries=False, timeout=MLFLOW_TIMEOUT_S)

    def experiment(self, name: str) -> str:
        """Id of the experiment of a name, made if there is none."""
        found = self._send("GET", f"experiments/get-by-name?experiment_name={quote(name, safe='')}")
        if found.status == 200:
            return str(found.json()["experiment"]["experiment_id"])
        return str(self.ask("experiments/create", {"name": name})["experiment_id"])

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """The decoded answer to a POST."""
        answer = self._send("POST", path, msgspec.json.encode(body))
        if answer.status != 200:
            said = answer.data[:200].decode(errors="replace")
            raise RefusedError(f"{self._url} refused {path} with HTTP {answer.status}: {said}", code="mlflow")
        try:
            return answer.json() if answer.data else {}
        except ValueError as error:
            raise ProtocolError(f"{self._url} does not answer as an MLflow server does") from error

    def _send(self, method: str, path: str, body: bytes | None = None) -> urllib3.BaseHTTPResponse:
        try:
            return self._pool.request(
                method,
                f"{self._url}/api/2.0/mlflow/{path}",
                body=body,
                headers={"Content-Type": "application/json"},
            )
        except urllib3.exceptions.HTTPError as error:
            raise UnreachableError(f"cannot reach an MLflow server at {self._url}: {error}") from error
