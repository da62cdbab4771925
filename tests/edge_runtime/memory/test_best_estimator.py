"""Which estimator a device takes where its task leaves that open, and what the plan says of it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_runtime.errors import CapExceededError
from edge_runtime.memory.best_estimator import StepLimits, best_plan
from edge_runtime.memory.plan import Planner, Work
from tests.edge_runtime.memory.test_plan import ALL, CALIBRATION, MIB, MODEL

WORK = Work(8, 128, 16, ALL, "best")
AMPLE = 1 << 32


def forward(draws: int) -> Work:
    return replace(WORK, update="forward", draws=draws)


EXACT = replace(WORK, update="backprop", draws=1)


def test_exact_gradients_are_taken_where_they_can_be() -> None:
    """With adjoint programs and ample memory the plan is that of backpropagation, and says so."""
    planner = Planner(MODEL, "row_int8", calibration=CALIBRATION)
    plan = best_plan(planner, WORK, AMPLE, StepLimits(3600.0, AMPLE))
    assert (plan.work, plan.choice) == (EXACT, planner.choose(EXACT, AMPLE).choice)
    assert plan.reason.startswith("exact gradients")


@pytest.mark.parametrize(
    ("planner", "budget_bytes", "limits", "reason"),
    [
        (
            Planner(replace(MODEL, segments=tuple(replace(each, adjoint=None) for each in MODEL.segments))),
            AMPLE,
            StepLimits(),
            "package little has no adjoint programs",
        ),
        (Planner(MODEL, "block_int8"), AMPLE, StepLimits(), "prepared in block_int8, whose products cannot"),
        (
            Planner(MODEL, "row_int8"),
            Planner(MODEL, "row_int8").smallest_cap(EXACT) - MIB,
            StepLimits(),
            "they need a cap of",
        ),
        (
            Planner(MODEL, "row_int8"),
            Planner(MODEL, "row_int8").smallest_cap(EXACT),
            StepLimits(disk_bytes=1),
            "would wait on a disk with 1 byte free",
        ),
    ],
    ids=["package", "arithmetic", "cap", "disk"],
)
def test_forward_mode_is_taken_otherwise(
    planner: Planner, budget_bytes: int, limits: StepLimits, reason: str
) -> None:
    """Whatever forbids exact gradients is the reason that the plan tells, and the draws are as many as fit."""
    plan = best_plan(planner, WORK, budget_bytes, limits)
    assert plan.work == forward(plan.work.draws)
    assert plan.peak.total_bytes <= budget_bytes
    assert reason in plan.reason
    assert plan.reason.startswith("forward mode with ")


def test_draws_are_given_up_for_time() -> None:
    """Of 16 draws as many are left, halved each time, as a step has time for; one is always taken."""
    planner = Planner(MODEL, "block_int8", calibration=CALIBRATION)
    seconds = {draws: planner.choose(forward(draws), AMPLE).step_s for draws in (16, 8, 4, 2, 1)}
    for draws, step_s in seconds.items():
        plan = best_plan(planner, WORK, AMPLE, StepLimits(step_s))
        assert plan.work.draws == draws
        assert ("take too long" in plan.reason) == (draws < 16)
    assert best_plan(planner, WORK, AMPLE, StepLimits(seconds[1] / 2)).work.draws == 1


def test_exact_gradients_that_take_too_long_are_left() -> None:
    """Where a step of backpropagation exceeds the time, forward mode is taken, and the plan tells both times."""
    planner = Planner(MODEL, "row_int8", calibration=CALIBRATION)
    limit_s = planner.choose(EXACT, AMPLE).step_s * 0.9
    plan = best_plan(planner, WORK, AMPLE, StepLimits(limit_s))
    assert plan.work.update == "forward"
    assert "the deadline leaves" in plan.reason
    assert plan.step_s <= limit_s


def test_no_plan_is_a_refusal_with_numbers() -> None:
    """A cap below one draw at a time is refused with the cap that would do."""
    planner = Planner(MODEL, "block_int8")
    with pytest.raises(CapExceededError) as raised:
        best_plan(planner, WORK, MIB)
    assert raised.value.required_bytes == planner.smallest_cap(forward(1))


def test_a_head_alone_leaves_nothing_to_choose() -> None:
    """Without slices the plan is the one that there is, and tells no reason."""
    plan = best_plan(Planner(MODEL), replace(WORK, slices=()), AMPLE)
    assert (plan.work.update, plan.reason) == ("forward", "")
