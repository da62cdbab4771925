"""What other sizes of the work would take, as the planner predicts it: how far each may go, and a grid around the work.

One size is varied at a time. In the grid each is shown in the choices that matter: weights resident or streamed, and
the preferred number of examples at a time or one.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from edge_runtime.errors import CapExceededError
from edge_runtime.figures import MIB
from edge_runtime.memory.plan import (
    SHORTEST_SEQUENCE,
    USABLE_SHARE,
    ExecutionChoice,
    Plan,
    Planner,
    WeightsMode,
    Work,
)
from edge_runtime.profile.document import Edge, EdgeSize, WhatIf, WorstCase
from edge_runtime.profile.request import MAX_BATCH, MAX_DRAWS

#: Largest number of options: 10 works in 4 ways each, and the chosen one, fit in.
MAX_OPTIONS = 60
#: An advised cap is a multiple of this.
ROUND_CAP_BYTES = 8 * MIB
#: Numbers of draws to show besides the one asked for.
DRAWS = (1, 4)
MODES: tuple[WeightsMode, ...] = ("resident", "streamed")


def what_if(planner: Planner, request: Work, chosen: Plan, cap_bytes: int) -> tuple[WhatIf, ...]:
    """Predictions around a work. Exactly one of them is the chosen plan.

    Args:
        planner: planner for the package on this machine.
        request: the work that was asked for.
        chosen: the plan that was chosen for it, perhaps with less work.
        cap_bytes: cap that an option has to fit, with the planner's margin.

    Returns:
        At most ``MAX_OPTIONS`` predictions, those for the chosen plan's work first.
    """
    limit = planner.manifest.sequence_limit
    works = dict.fromkeys([chosen.work, request, *_around(request, limit)])
    options = [
        (plan := planner.plan(work, choice), _option(plan, cap_bytes, chosen=plan.choice == chosen.choice))
        for work in works
        for choice in _ways(planner, work, chosen)
    ]
    return tuple(
        replace(option, chosen=option.chosen and plan.work == chosen.work) for plan, option in options
    )[:MAX_OPTIONS]


def edges(planner: Planner, chosen: Plan, cap_bytes: int) -> tuple[Edge, ...]:
    """How far batch, sequence and draws may each go under a cap, the others as in the chosen plan.

    Args:
        planner: planner for the package on this machine.
        chosen: the plan to start from.
        cap_bytes: cap that has to be kept, with the planner's margin.
    """
    work = chosen.work
    found = [
        _edge(planner, work, "batch_size", MAX_BATCH, cap_bytes),
        _edge(planner, work, "sequence", planner.manifest.sequence_limit, cap_bytes),
    ]
    if work.update == "forward" and work.slices:
        found.append(_edge(planner, work, "draws", MAX_DRAWS, cap_bytes))
    return tuple(found)


def _edge(planner: Planner, work: Work, size: EdgeSize, bound: int, cap_bytes: int) -> Edge:
    def at(count: int) -> WhatIf:
        return _best(planner, replace(work, **{size: count}), cap_bytes)

    count: int = getattr(work, size)
    tried = at(count)
    if not tried.fits:
        while not tried.fits:
            first_over = tried
            if count == 1:
                return Edge(size, None, first_over, bound)
            count //= 2
            tried = at(count)
        return Edge(size, tried, first_over, bound)
    while tried.fits:
        largest = tried
        if count >= bound:
            return Edge(size, largest, None, bound)
        count = min(bound, 2 * count)
        tried = at(count)
    return Edge(size, largest, tried, bound)


def _best(planner: Planner, work: Work, cap_bytes: int) -> WhatIf:
    """The plan that would be chosen for a work; the smallest one if none fits."""
    try:
        plan = planner.choose(work, cap_bytes)
    except CapExceededError:
        plan = planner.smallest(work)
    return _option(plan, cap_bytes, chosen=False)


def worst_case(planner: Planner, asked: Work, cap_bytes: int, excess_bytes: int = 0) -> WorstCase:
    """The largest step that a task allows, and the caps that follow from it.

    Args:
        planner: planner for the package on this machine.
        asked: the work as it was asked for: its batch size, and its limit of tokens whatever rows there are.
        cap_bytes: the cap.
        excess_bytes: memory that was measured beyond what had been predicted, which is added to each prediction.
    """
    smallest_cap = planner.smallest_cap(asked) + _rounded_up(excess_bytes, MIB)
    try:
        plan, fits = planner.choose(asked, cap_bytes - excess_bytes), True
    except CapExceededError:
        plan, fits = planner.smallest(asked), False
    needed = int((plan.peak.total_bytes + excess_bytes) / USABLE_SHARE)
    advised = max(smallest_cap, _rounded_up(needed, ROUND_CAP_BYTES))
    if fits:
        advised = max(smallest_cap, min(advised, cap_bytes // MIB * MIB))
    return WorstCase(
        batch_size=asked.batch_size,
        sequence=asked.sequence,
        predicted_peak_bytes=plan.peak.total_bytes + excess_bytes,
        fits=fits,
        gave_up=plan.gave_up,
        smallest_cap_bytes=smallest_cap,
        advised_cap_bytes=advised,
    )


def _rounded_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _around(work: Work, sequence_limit: int) -> Iterator[Work]:
    """The work with one size changed: batch, sequence, draws, or slices (those nearest the head stay)."""
    for batch in (work.batch_size * 2, work.batch_size // 2):
        if batch:
            yield replace(work, batch_size=batch)
    for sequence in (min(sequence_limit, work.sequence * 2), max(SHORTEST_SEQUENCE, work.sequence // 2)):
        if sequence <= sequence_limit:
            yield replace(work, sequence=sequence)
    for draws in DRAWS if work.update == "forward" else ():
        yield replace(work, draws=draws)
    for count in (len(work.slices) // 2, 1):
        if count and count < len(work.slices):
            yield replace(work, slices=work.slices[-count:])


def _ways(planner: Planner, work: Work, chosen: Plan) -> list[ExecutionChoice]:
    """The choices for a work that are worth a row, the chosen one among them if this is the chosen plan's work."""
    fastest = next(planner.choices(work))
    largest = fastest.micro_batch
    together = chosen.choice.draws_at_a_time
    draws = min(work.draws, together) if together < chosen.work.draws else fastest.draws_at_a_time
    own = [chosen.choice] if work == chosen.work else []
    ways = [
        ExecutionChoice(weights, size, draws, chosen.choice.inputs)
        for weights in MODES
        for size in (largest, 1)
    ]
    return sorted(
        dict.fromkeys([*ways, *own]),
        key=lambda way: (MODES.index(way.weights), -way.micro_batch, -way.draws_at_a_time),
    )


def _option(plan: Plan, cap_bytes: int, *, chosen: bool) -> WhatIf:
    work, peak = plan.work, plan.peak.total_bytes
    return WhatIf(
        batch_size=work.batch_size,
        micro_batch=plan.choice.micro_batch,
        sequence=work.sequence,
        draws=work.draws,
        slices=len(work.slices),
        weights=plan.choice.weights,
        predicted_peak_bytes=peak,
        predicted_step_s=plan.step_s,
        fits=peak <= int(cap_bytes * USABLE_SHARE),
        chosen=chosen,
        draws_at_a_time=plan.choice.draws_at_a_time,
    )
