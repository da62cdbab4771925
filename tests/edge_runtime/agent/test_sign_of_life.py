"""Signs of life: as often as asked, until the work ends or nobody wants it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from edge_runtime.agent import sign_of_life
from edge_runtime.agent.sign_of_life import SignOfLife
from edge_runtime.errors import RefusedError, UnreachableError
from edge_runtime.protocol.messages import Standing

PATIENCE_S = 20.0


class Other:
    """A coordinator that answers signs as it is told, the last answer for ever, and counts them."""

    def __init__(self, *answers: Standing | Exception) -> None:
        self.answers = list(answers)
        self.said = threading.Semaphore(0)
        self.count = 0

    def __call__(self) -> Standing:
        """One sign."""
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.count += 1
        self.said.release()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait_for(self, count: int) -> None:
        """Until so many signs have come."""
        for _ in range(count):
            assert self.said.acquire(timeout=PATIENCE_S)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pauses may be short."""
    monkeypatch.setattr(sign_of_life, "SHORTEST_PAUSE_S", 0.01)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "sign-of-life"]


def test_signs_come_until_the_work_ends() -> None:
    """The first sign is sent at once, others as often as asked, and none after the work."""
    other, stopped = Other(Standing(0.01)), threading.Event()
    with SignOfLife(other, stopped.set) as life:
        assert other.count == 1
        other.wait_for(4)
    count = other.count
    assert (life.unwanted, stopped.is_set()) == (False, False)
    assert not other.said.acquire(timeout=0.1) or other.count == count


def test_a_pause_from_outside_is_bounded() -> None:
    """A coordinator that asks for signs every 0 s or every 1e9 s gets them within bounds."""
    life = SignOfLife(Other(Standing(1e9)), lambda: None)
    with life:
        assert life._pause_s == sign_of_life.LONGEST_PAUSE_S
    other = Other(Standing(0.0))
    with SignOfLife(other, lambda: None) as life:
        assert life._pause_s == 0.01


def test_work_that_nobody_wants_is_stopped() -> None:
    """Once the coordinator wants the result no more the work is stopped, once."""
    stops: list[int] = []
    stopped = threading.Event()

    def stop() -> None:
        stops.append(1)
        stopped.set()

    with SignOfLife(Other(Standing(0.01), Standing(0.01), Standing(0.01, wanted=False)), stop) as life:
        assert stopped.wait(PATIENCE_S)
    assert (life.unwanted, stops) == (True, [1])


def test_an_older_coordinator_gets_no_signs() -> None:
    """A coordinator that does not know of signs is asked once."""
    other = Other(RefusedError("no such path", code="unknown_path"))
    with SignOfLife(other, lambda: None) as life:
        assert life._thread is None
    assert other.count == 1


def test_a_sign_that_does_not_arrive_is_sent_again() -> None:
    """While the coordinator cannot be reached, signs go on."""
    other = Other(
        Standing(0.01), UnreachableError("no answer"), UnreachableError("no answer"), Standing(0.01)
    )
    with SignOfLife(other, lambda: None):
        other.wait_for(5)
