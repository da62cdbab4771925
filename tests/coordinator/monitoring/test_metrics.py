"""What a monitoring system scrapes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edge_runtime.protocol.messages import CheckInRequest, encode
from tests.coordinator.conftest import FakeDevice, World
from tests.coordinator.monitoring.scrape import scrape

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "docs/monitoring"


def test_a_run_is_seen_from_its_first_round_to_its_end(world: World) -> None:
    """Devices by state, rounds, tasks, refusals, bytes and the run's own figures follow what happens."""
    devices = world.fleet("ash", "birch", "cedar")
    run_id = world.create_run(rounds=2)
    world.play()
    during = scrape(world)
    assert [labels for name, labels in during if name == "edge_rounds"] == [(("state", "selecting"),)]
    assert during["edge_runs", (("state", "running"),)] == 1
    assert during["edge_devices", (("device_class", "generic"), ("state", "asked"))] >= 1
    labels = (("name", str(world.run()["name"])), ("run_id", run_id))
    assert during["edge_run_rounds_committed", labels] == 0
    world.work(devices)
    after = scrape(world)
    assert after["edge_rounds", (("state", "committed"),)] == 1
    assert after["edge_run_rounds_committed", labels] == 1
    assert (
        after["edge_body_bytes_total", (("direction", "up"),)]
        > during["edge_body_bytes_total", (("direction", "up"),)]
    )
    check_ins = (("method", "POST"), ("route", "/v1/check-in"), ("status", "200"))
    assert after["edge_http_request_seconds_count", check_ins] >= 6
    assert after["edge_database_bytes", (("file", "database"),)] > 0


def test_refusals_are_counted_by_code(world: World) -> None:
    """A request that is refused, by the access layer or by a handler, counts under its code."""
    (device,) = world.fleet("ash")
    stranger = FakeDevice(world, "stranger")
    stranger.device_id = "d-unknown"
    body = encode(CheckInRequest("test", 1 << 30, 1 << 20, 10))
    assert stranger.send("POST", "/v1/check-in", body).status_code == 401
    assert device.send("GET", f"/v1/blobs/{'0' * 64}").status_code == 404
    assert world.admin("GET", "/v1/admin/runs/none").status_code == 404
    assert world.client.get("/nowhere").status_code == 404
    found = {labels[0][1] for name, labels in scrape(world) if name == "edge_http_refusals_total"}
    assert {"unknown_device", "unknown_blob", "unknown_run"} <= found


@pytest.mark.parametrize("page", ["grafana-dashboard.json", "prometheus-alerts.yml"])
def test_what_operators_load_asks_for_metrics_that_exist(world: World, page: str) -> None:
    """Every metric that the dashboard and the alerts name is scraped from a coordinator with a run."""
    devices = world.fleet("ash", "birch", "cedar")
    world.create_run(rounds=3)
    world.work(devices)
    assert world.client.get("/nowhere").status_code == 404
    world.admin("GET", "/v1/admin/runs/none")
    scraped = {name for name, _ in scrape(world)}
    text = (MONITORING / page).read_text()
    if page.endswith(".json"):
        json.loads(text)
    named = set(re.findall(r"\b(?:edge|process)_[a-z_]+", text))
    unset = {"edge_run_accuracy", "edge_run_loss", "edge_devices_not_eligible", "edge_tasks_lapsed"}
    assert named
    assert named <= scraped | unset
