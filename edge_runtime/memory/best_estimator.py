"""``update = "best"``: the estimator that a device can have, chosen when its plan is.

An exact gradient is taken where the package has adjoint programs in the arithmetic that it is prepared in, and the plan
fits the cap, the disk and the time. Otherwise forward mode, with as many draws as fit: those that the task asks for, or
half of them, a quarter, down to one. Either way the estimate's mean is the gradient, so devices may differ; the result
says which was taken, and a server weighs it by that.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from edge_runtime.errors import CapExceededError, PackageError
from edge_runtime.figures import duration, plural, size, whole_size
from edge_runtime.memory.plan import Plan, Planner, Work, first_segment

#: Share of a task's time that its steps may be planned for; the rest is for fetching, preparing and handing in.
USABLE_TIME = 0.5


class StepLimits(Struct, frozen=True):
    """What a step may take beside memory.

    Attributes:
        seconds: time of a step; None if nothing limits it. A plan whose time is not known keeps to any.
        disk_bytes: room for layer inputs; None if it is not known.
    """

    seconds: float | None = None
    disk_bytes: int | None = None


def best_plan(planner: Planner, work: Work, budget_bytes: int, limits: StepLimits | None = None) -> Plan:
    """The plan of the best estimator; its ``reason`` says which it is and why.

    Args:
        planner: planner of the package on this machine.
        work: size of a step's work, whose ``draws`` are the most that forward mode takes.
        budget_bytes: memory that the plan may use.
        limits: what a step may take beside memory; None sets no limit.

    Raises:
        CapExceededError: not even forward mode with one draw at a time fits.
    """
    limits = limits or StepLimits()
    if first_segment(planner.manifest, work.slices) is None:
        return planner.choose(replace(work, update="forward"), budget_bytes)
    exact = _exact_plan(planner, work, budget_bytes, limits)
    if isinstance(exact, Plan):
        return replace(exact, reason="exact gradients: adjoint programs fit memory, disk and time")
    plan, fewer = _forward_plan(planner, work, budget_bytes, limits)
    return replace(
        plan,
        reason=f"forward mode with {plural(plan.work.draws, 'draw')}{fewer}, not exact gradients: {exact}",
    )


def _exact_plan(planner: Planner, work: Work, budget_bytes: int, limits: StepLimits) -> Plan | str:
    """The plan of an exact gradient, or why there is none."""
    exact = replace(work, update="backprop", draws=1)
    try:
        plan = planner.choose(exact, budget_bytes)
    except PackageError as error:
        return str(error).partition(";")[0]
    except CapExceededError as error:
        return f"they need a cap of {whole_size(error.required_bytes)}, there are {size(budget_bytes)}"
    spilled_bytes = planner.spilled_bytes(exact) if plan.choice.inputs == "disk" else 0
    if limits.disk_bytes is not None and spilled_bytes > limits.disk_bytes:
        return (
            f"layer inputs of {size(spilled_bytes)} would wait on a disk with {size(limits.disk_bytes)} free"
        )
    return _too_long(plan, limits) or plan


def _forward_plan(planner: Planner, work: Work, budget_bytes: int, limits: StepLimits) -> tuple[Plan, str]:
    """The plan of forward mode with the most draws that fit, and words for those that were given up."""
    draws, why = work.draws, ""
    while True:
        fewer = f" of {work.draws} ({why})" if why else ""
        try:
            plan = planner.choose(replace(work, update="forward", draws=draws), budget_bytes)
        except CapExceededError:
            if draws == 1:
                raise
            why = "more do not fit the cap"
        else:
            slow = _too_long(plan, limits)
            if slow is None or draws == 1:
                return plan, fewer
            why = "more would take too long"
        draws = max(1, draws // 2)


def _too_long(plan: Plan, limits: StepLimits) -> str | None:
    if limits.seconds is None or plan.step_s is None or plan.step_s <= limits.seconds:
        return None
    return f"a step would take {duration(plan.step_s)}, the deadline leaves {duration(limits.seconds)}"
