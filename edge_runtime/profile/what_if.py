"""What other sizes of the work would take: a bounded grid around what was asked, as the planner predicts it.

One size is varied at a time. Each is shown in the choices that matter: weights resident or streamed, and the preferred
number of examples at a time or one.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from edge_runtime.memory.plan import (
    SHORTEST_SEQUENCE,
    USABLE_SHARE,
    ExecutionChoice,
    Plan,
    Planner,
    WeightsMode,
    Work,
)
from edge_runtime.profile.document import WhatIf

#: Largest number of options: 10 works in 4 ways each, and the chosen one, fit in.
MAX_OPTIONS = 60
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
