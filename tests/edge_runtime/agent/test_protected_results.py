"""What the result of a protected task tells beside the contribution."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_runtime.agent.decisions import build_result
from edge_runtime.memory.plan import ExecutionChoice, PeakPrediction, Plan, Work
from edge_runtime.protocol.messages import MemoryReport, Protection, decode_result
from edge_runtime.worker.jobs import TrainOutcome
from tests.edge_runtime.golden.generate import TASK

PLAN = Plan(
    Work(8, 16, 1, ()), ExecutionChoice("resident", 1, 1), PeakPrediction(0, 0, 0, 0, 0, 0, 0, 0), None
)
OUTCOME = TrainOutcome(37, 3, 1, 0.5, 1.0, MemoryReport(5, 4, 100, floor_bytes=3), PLAN)


@pytest.mark.parametrize("protection", [Protection(1.0, 0.5), Protection(None, 0.0, 32)])
def test_a_protected_result_tells_nothing_of_the_rows(protection: Protection) -> None:
    """With noise or masks neither loss nor examples nor skipped steps are told."""
    result = decode_result(build_result(replace(TASK, protection=protection), OUTCOME, b""))
    assert (result.mean_loss, result.examples) == (None, 1)
    assert (result.steps_applied, result.steps_skipped) == (TASK.steps, 0)


def test_where_the_server_adds_noise_the_loss_is_not_told_either() -> None:
    """The coordinator is trusted with the change there, and reports would show the loss."""
    result = decode_result(build_result(replace(TASK, protection=Protection(1.0)), OUTCOME, b""))
    assert (result.mean_loss, result.examples) == (None, 37)


def test_a_plain_result_tells_all() -> None:
    """Without protection everything is as it was."""
    result = decode_result(build_result(TASK, OUTCOME, b""))
    assert (result.mean_loss, result.examples, result.steps_applied, result.steps_skipped) == (0.5, 37, 3, 1)
