"""``edge-runtime plan``: the chosen plan and its predicted peak in words."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from edge_runtime.figures import column_mib, duration, plural, size
from edge_runtime.memory.plan import USABLE_SHARE, Plan
from edge_runtime.profile.request import PlanRequest
from edge_runtime.profile.text import cap_setting, edge_lines, gradient_words, option_lines, table
from edge_runtime.profile.top_activations import top_activations_line
from edge_runtime.profile.what_if import edges, what_if

PREDICTED_PARTS = {
    "libraries": "interpreter and libraries",
    "tokenizer": "what the tokenizer leaves behind",
    "engine": "sessions, and what the engine repacks or plans ahead",
    "weights": "frozen weights in memory at a time",
    "live": "largest live set of any program",
    "waiting": "values that wait between segments",
    "slices": "trained values, their change and tangents",
}


class PlanAnswer(Struct, frozen=True):
    """A plan as ``--json`` tells it.

    Attributes:
        package: name of the package.
        arithmetic: arithmetic that is planned for.
        engine: name of the engine.
        prepared: whether the package is prepared for this machine; if not, times are not known.
        cap_bytes: the cap.
        usable_bytes: part of the cap that a plan may use.
        smallest_cap_bytes: smallest cap that this work fits.
        estimator: which estimator was taken and why, if that was left open; else empty.
        plan: the plan that fits the cap.
    """

    package: str
    arithmetic: str
    engine: str
    prepared: bool
    cap_bytes: int
    usable_bytes: int
    smallest_cap_bytes: int
    estimator: str
    plan: Plan


def plan_answer(request: PlanRequest) -> PlanAnswer:
    """The plan that fits the cap.

    Raises:
        CapExceededError: no plan fits; the message gives the smallest cap that would do.
    """
    planner = request.planner()
    return PlanAnswer(
        package=request.package.manifest.name,
        arithmetic=planner.arithmetic,
        engine=request.engine,
        prepared=request.prepared is not None,
        cap_bytes=request.cap_bytes,
        usable_bytes=int(request.cap_bytes * USABLE_SHARE),
        smallest_cap_bytes=planner.smallest_cap(request.work),
        estimator=request.reason,
        plan=planner.choose(request.work, request.cap_bytes, may_change_work=True),
    )


def plan_lines(request: PlanRequest, *, with_options: bool = False) -> Iterator[str]:
    """The plan that fits the cap, line by line.

    Args:
        request: package, cap and work.
        with_options: whether to add the table of other sizes.

    Raises:
        CapExceededError: no plan fits; the message gives the smallest cap that would do.
    """
    return (line.rstrip() for line in _lines(request, with_options=with_options))


def _lines(request: PlanRequest, *, with_options: bool) -> Iterator[str]:
    planner = request.planner()
    plan = planner.choose(request.work, request.cap_bytes, may_change_work=True)
    arithmetic = planner.arithmetic + ("" if request.prepared else ", unless preparing finds another better")
    work, choice = plan.work, plan.choice
    yield f"package   {request.package.manifest.name}, arithmetic {arithmetic}"
    yield (
        f"work      {plural(work.batch_size, 'example')} of {plural(work.sequence, 'token')}, "
        f"{gradient_words(work.update, work.draws)}, {plural(len(work.slices), 'slice')} and the head"
    )
    if request.reason:
        yield f"estimator {request.reason}"
    yield f"plan      weights {choice.weights}, {_at_a_time(plan)}"
    if planned := planner.planned_bytes(work):
        yield f"planned   {size(planned)} ahead of time by {request.engine}, for all programs of this work"
    if (line := top_activations_line(planner, plan)) is not None:
        yield f"top-k     {line}"
    yield f"given up  {'; '.join(plan.gave_up) or 'nothing'}"
    yield f"step      {_step(request, plan)}"
    yield f"cap       {cap_setting(planner.smallest_cap(request.work))} is the smallest that this work fits"
    yield ""
    yield from _peak(plan, request.cap_bytes)
    if with_options:
        yield ""
        yield "other sizes, peaks in MiB:"
        yield from edge_lines(edges(planner, plan, request.cap_bytes))
        yield from option_lines(what_if(planner, request.work, plan, request.cap_bytes))


def _at_a_time(plan: Plan) -> str:
    choice = plan.choice
    if plan.work.update == "backprop":
        place = "on disk" if choice.inputs == "disk" else "in memory"
        return f"layer inputs {place}, {plural(choice.micro_batch, 'example')} at a time"
    return f"{plural(choice.micro_batch, 'example')} and {plural(choice.draws_at_a_time, 'draw')} at a time"


def _step(request: PlanRequest, plan: Plan) -> str:
    if plan.step_s is None:
        return f"time not known: {request.unprepared}; edge-runtime profile prepares it"
    prepared = request.prepared
    if prepared is not None and prepared.calibration.disturbed:
        return f"{duration(plan.step_s)}, predicted from times that other work disturbed; prepare again when it is idle"
    return f"{duration(plan.step_s)}, predicted"


def _peak(plan: Plan, cap_bytes: int) -> Iterator[str]:
    peak, parts = plan.peak, plan.peak.parts
    rows = [(name, column_mib(count), PREDICTED_PARTS.get(name, "")) for name, count in parts.items()]
    passing = peak.total_bytes - sum(parts.values())
    if passing > 0:
        rows.append(("loading", column_mib(passing), "the tokenizer at work, before the first step"))
    usable = int(cap_bytes * USABLE_SHARE)
    end = f"a plan may use {size(usable)}, {USABLE_SHARE:.0%} of the cap".replace("%", " %")
    yield from table(
        ("part", "MiB", ""), [*rows, ("peak", column_mib(peak.total_bytes), f"predicted; {end}")], "lrl"
    )
