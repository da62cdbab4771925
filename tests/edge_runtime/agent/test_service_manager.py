"""What the service manager hears of the agent, at a real socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.agent.service_manager import SIGNS_IN_A_PERIOD, ServiceManager


class Listener:
    """A service manager's end of the socket."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(path)

    def heard(self) -> list[str]:
        """What came since the last call."""
        words: list[str] = []
        try:
            while True:
                words.append(self.socket.recv(1024).decode())
        except BlockingIOError:
            return words


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(str(tmp_path / "notify"))
    yield made
    made.socket.close()


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(tmp_path / "notify"), **more}


def test_start_and_stop_are_told(tmp_path: Path, listener: Listener) -> None:
    """The words of sd_notify(3) arrive, each as one datagram."""
    manager = ServiceManager(environment(tmp_path))
    manager.ready()
    manager.stopping()
    assert listener.heard() == ["READY=1", "STOPPING=1"]


def test_an_abstract_socket_is_reached() -> None:
    """A name that begins with @ is a socket without a file."""
    name = f"edge-runtime-test-{os.getpid()}"
    listener = Listener(f"\0{name}")
    ServiceManager({"NOTIFY_SOCKET": f"@{name}"}).ready()
    assert listener.heard() == ["READY=1"]
    listener.socket.close()


def test_signs_of_life_are_as_many_as_are_needed(tmp_path: Path, listener: Listener) -> None:
    """However often the loops feed the watchdog, it is told a few times in its period."""
    now_s = [100.0]
    manager = ServiceManager(
        environment(tmp_path, WATCHDOG_USEC="40000000", WATCHDOG_PID=str(os.getpid())), lambda: now_s[0]
    )
    for _ in range(40):  # half-second looks at a worker, for half a period
        manager.alive()
        now_s[0] += 0.5
    assert listener.heard() == ["WATCHDOG=1"] * (SIGNS_IN_A_PERIOD // 2)


def test_a_long_wait_feeds_the_watchdog(tmp_path: Path, listener: Listener) -> None:
    """No single sleep is longer than the pause between signs, and together they are the wait."""
    now_s, slept = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now_s[0] += seconds

    manager = ServiceManager(environment(tmp_path, WATCHDOG_USEC="40000000"), lambda: now_s[0])
    manager.wait(35.0, sleep)
    assert slept == [10.0, 10.0, 10.0, 5.0]
    assert listener.heard() == ["WATCHDOG=1"] * 4


@pytest.mark.parametrize(
    "more",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}],
)
def test_without_a_watchdog_none_is_fed(tmp_path: Path, listener: Listener, more: dict[str, str]) -> None:
    """Where no watchdog is set, or one for another process, the agent sleeps through."""
    slept = list[float]()
    manager = ServiceManager(environment(tmp_path, **more))
    manager.wait(3600.0, slept.append)
    manager.alive()
    assert slept == [3600.0]
    assert listener.heard() == []


def test_no_service_manager_and_a_dead_one_stop_nothing(tmp_path: Path, caplog) -> None:
    """Started by hand the agent tells nobody; a socket that nobody reads any more is logged and ends nothing."""
    ServiceManager({}).ready()
    ServiceManager(environment(tmp_path)).ready()
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == [
        "phase=service_manager_unreachable"
    ]
