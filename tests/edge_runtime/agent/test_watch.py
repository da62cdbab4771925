"""Conditions are looked at while a task is trained."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from edge_runtime.agent import watch
from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.eligibility import Eligibility, Gate
from edge_runtime.agent.host import Host
from edge_runtime.agent.watch import ConditionsWatch
from tests.edge_runtime.agent.test_host import machine

ZONE = "sys/class/thermal/thermal_zone0/temp"


def test_heat_stops_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is too hot the work is told to stop, once, with the reason."""
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.01)
    host, stopped = machine(tmp_path, {ZONE: "50000"}), threading.Semaphore(0)
    with ConditionsWatch(
        Gate(Eligibility(highest_celsius=70.0), Conditions(host, tmp_path)), stopped.release
    ) as conditions:
        assert not stopped.acquire(timeout=0.05)
        machine(tmp_path, {ZONE: "71000"})
        assert stopped.acquire(timeout=20)
    assert conditions.reason == "too_hot"
    assert not stopped.acquire(blocking=False)


def test_what_the_task_itself_brings_about_stops_nothing(tmp_path: Path) -> None:
    """Load and memory are the task's own, and where nothing else is asked for there is no thread at all."""
    settings = Eligibility(highest_load_per_core=0.001, needs_free_memory=True, least_rows=100)
    before = threading.active_count()
    with ConditionsWatch(Gate(settings, Conditions(Host(tmp_path), tmp_path)), pytest.fail) as conditions:
        assert threading.active_count() == before
    assert conditions.reason is None


def test_hours_that_end_stop_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that runs into the day stops where the night ends."""
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.01)
    times, stopped = iter(["05:59", "05:59", "06:00"]), threading.Event()
    gate = Gate(
        Eligibility(hours=("22:00-06:00",)),
        Conditions(Host(tmp_path), tmp_path),
        lambda: time.strptime(next(times), "%H:%M"),
    )
    with ConditionsWatch(gate, stopped.set) as conditions:
        assert stopped.wait(20)
    assert conditions.reason == "outside_hours"
