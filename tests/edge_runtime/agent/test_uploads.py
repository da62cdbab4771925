"""How a result is handed in: whole, or in parts where it is large and the coordinator knows them."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.agent.uploads import deliver
from edge_runtime.errors import UnreachableError
from edge_runtime.protocol.messages import PART_BYTES, Refusal, ResultReceipt, UploadStanding


class OldCoordinator:
    """A coordinator that knows no uploads in parts."""

    def __init__(self) -> None:
        self.whole: list[bytes] = []

    def upload_standing(self, task_id: str, sha256: str) -> Refusal:
        """Not known there."""
        del task_id, sha256
        return Refusal("unknown_path", "Not Found")

    def put_result(self, task_id: str, body: bytes) -> ResultReceipt:
        """The whole result."""
        del task_id
        self.whole.append(body)
        return ResultReceipt("counted")


def test_an_older_coordinator_gets_it_whole() -> None:
    """Where parts are not known, and where the result is small, it goes in one request."""
    old: Any = OldCoordinator()
    for body in (bytes(PART_BYTES), bytes(PART_BYTES + 1)):
        assert deliver(old, "t", body, lambda _: None) == ResultReceipt("counted")
    assert [len(body) for body in old.whole] == [PART_BYTES, PART_BYTES + 1]


class Coordinator:
    """A coordinator whose answers to parts are given."""

    def __init__(self, *answers: UploadStanding | Refusal) -> None:
        self.answers = list(answers)
        self.offsets: list[int] = []

    def upload_standing(self, task_id: str, sha256: str) -> UploadStanding:
        """Where it stands."""
        del task_id, sha256
        return UploadStanding(0)

    def put_part(self, task_id: str, sha256: str, offset: int, data: bytes) -> UploadStanding | Refusal:
        """The next answer."""
        del task_id, sha256, data
        self.offsets.append(offset)
        return self.answers.pop(0)


@pytest.mark.parametrize(
    "answer",
    [Refusal("wrong_offset", "go on at 5"), Refusal("digest_mismatch", "begin anew"), UploadStanding(0)],
)
def test_what_decides_nothing_keeps_the_result(answer: UploadStanding | Refusal) -> None:
    """An upload that stands elsewhere, is damaged or gets nowhere is tried again later, and the result is kept."""
    coordinator: Any = Coordinator(answer, answer)
    with pytest.raises(UnreachableError):
        deliver(coordinator, "t", bytes(PART_BYTES + 1), lambda _: None)
    assert coordinator.offsets == [0, 0]


def test_a_clear_no_ends_the_upload() -> None:
    """A result that nobody waits for any more is dropped at its first part."""
    coordinator: Any = Coordinator(Refusal("stale", "the round is over"))
    assert deliver(coordinator, "t", bytes(PART_BYTES + 1), lambda _: None) == Refusal(
        "stale", "the round is over"
    )
