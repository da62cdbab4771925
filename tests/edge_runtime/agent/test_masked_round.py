"""The agent's part in masked rounds: kept before it leaves, forgotten when it is over."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_runtime.agent.masked_round import PART, VECTOR, MaskedRound
from edge_runtime.errors import RefusedError, UnreachableError
from edge_runtime.protocol.messages import MaskingOver, MaskingWait, Protection, ResultReceipt, ShareSecrets
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.golden.generate import TASK
from tests.edge_runtime.masking.test_participant import Round

TASK_TO_MASK = replace(TASK, protection=Protection(None, 0.0, 32, 1.0, 1000), slot=0)


class Coordinator:
    """Answers what it is told to, and keeps what it gets."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.got: list[tuple[str, object]] = []
        self.reachable = True
        self.refusal = ""

    def masking_stage(self, task_id: str) -> object:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def put_masking(self, task_id: str, what: str, body: object) -> ResultReceipt:
        self.got.append((what, body))
        if not self.reachable:
            raise UnreachableError("no answer")
        if self.refusal:
            raise RefusedError("no", code=self.refusal)
        return ResultReceipt("counted")


def test_without_a_contribution_nothing_is_asked(tmp_path: Path) -> None:
    """An agent that masks nothing asks nothing."""
    assert MaskedRound(tmp_path).go_on(Coordinator()) is None  # type: ignore[arg-type]


def test_an_answer_is_kept_before_it_leaves_and_is_the_same_again(tmp_path: Path) -> None:
    """An answer that was lost on its way is given again after a restart, byte for byte."""
    others = Round(4)
    MaskedRound(tmp_path).begin(TASK_TO_MASK, generate_key(), bytes(40))
    question = others.question(0)
    lost = Coordinator(question)
    lost.reachable = False
    with pytest.raises(UnreachableError):
        MaskedRound(tmp_path).go_on(lost)  # type: ignore[arg-type]
    again = Coordinator(question, MaskingWait(3.0))
    assert MaskedRound(tmp_path).go_on(again) == 3.0  # type: ignore[arg-type]
    assert again.got == lost.got
    assert (tmp_path / PART).stat().st_mode & 0o777 == 0o600


def test_waits_are_bounded_and_a_round_that_is_over_is_forgotten(tmp_path: Path) -> None:
    """However long a coordinator says, the device asks within a minute; secrets go when they are of no use."""
    round_ = MaskedRound(tmp_path)
    round_.begin(TASK_TO_MASK, generate_key(), bytes(40))
    assert round_.go_on(Coordinator(MaskingWait(1e6))) == 60.0  # type: ignore[arg-type]
    assert round_.go_on(Coordinator(MaskingOver("over"))) is None  # type: ignore[arg-type]
    assert not (tmp_path / PART).exists()
    assert not (tmp_path / VECTOR).exists()


def test_a_question_that_would_unmask_ends_its_part(tmp_path: Path) -> None:
    """A device that is asked to share with one other alone sends nothing, and drops its secrets."""
    round_ = MaskedRound(tmp_path)
    round_.begin(TASK_TO_MASK, generate_key(), bytes(40))
    question = Round(4).question(0)
    coordinator = Coordinator(ShareSecrets(2, question.peers[:1]))
    assert round_.go_on(coordinator) is None  # type: ignore[arg-type]
    assert coordinator.got == []
    assert not (tmp_path / PART).exists()


def test_refusals_are_told_apart(tmp_path: Path) -> None:
    """A round that went on is asked about again; a task that is gone ends; of a revoked device the agent hears."""
    round_ = MaskedRound(tmp_path)
    round_.begin(TASK_TO_MASK, generate_key(), bytes(40))
    late = Coordinator(Round(4).question(0), MaskingWait(2.0))
    late.refusal = "stale"
    assert round_.go_on(late) == 2.0  # type: ignore[arg-type]
    with pytest.raises(RefusedError):
        round_.go_on(Coordinator(RefusedError("out", code="revoked")))  # type: ignore[arg-type]
    assert (tmp_path / PART).exists()
    assert round_.go_on(Coordinator(RefusedError("gone", code="unknown_task"))) is None  # type: ignore[arg-type]
    assert not (tmp_path / PART).exists()


def test_a_damaged_file_is_dropped(tmp_path: Path) -> None:
    """What cannot be read any more is not answered for."""
    (tmp_path / PART).write_bytes(b"\xc1")
    assert MaskedRound(tmp_path).go_on(Coordinator()) is None  # type: ignore[arg-type]
    assert not (tmp_path / PART).exists()
