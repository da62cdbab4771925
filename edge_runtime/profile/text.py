"""The memory-budget report in words: its sentences, and the whole of it as plain text for a terminal.

The page uses the same sentences, so that both say the same. Sizes are printed in MiB (2^20 bytes), small ones in KiB
(2^10 bytes). No line of the text is longer than :data:`COLUMNS`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from edge_runtime.figures import MIB, NOT_MEASURED, column_mib, duration, plural, share, size, whole_size
from edge_runtime.profile.document import (
    UNEXPLAINED,
    UNEXPLAINED_SHARE,
    Change,
    Difference,
    Edge,
    Failure,
    LedgerRow,
    Profile,
    WhatIf,
    thin,
)
from edge_runtime.protocol.messages import Update

COLUMNS = 100
_ENFORCERS = {
    "cgroup_v2": "the kernel held the worker to the cap (cgroup v2, memory.max)",
    "cgroup_v1": "the kernel held the worker to the cap (cgroup v1, memory.limit_in_bytes)",
    "rlimit": "a limit of the process held the worker to the cap (RLIMIT)",
    "none": "nothing held the worker to the cap: it was only compared with it afterwards",
}
_LEVELS = "▁▂▃▄▅▆▇█"


def verdict_line(profile: Profile) -> str:
    """Measured peak, cap and headroom in one line."""
    return f"measured {size(profile.peak_bytes)} of a cap of {size(profile.cap_bytes)}, {headroom(profile)}"


def headroom(profile: Profile) -> str:
    """What the cap leaves, or how far it was exceeded."""
    if profile.headroom_bytes < 0:
        return f"{size(-profile.headroom_bytes)} over the cap"
    return f"{share(profile.headroom_share)} headroom"


def failure_lines(profile: Profile) -> list[str]:
    """One sentence for each reason why the run did not keep to its budget."""
    charged, growth = profile.charged_peak_bytes or 0, profile.growth
    sentences: dict[Failure, str] = {
        "killed": "The kernel ended the worker: the figures are those up to that moment.",
        "over_cap": f"The measured peak lies {size(-profile.headroom_bytes)} above the cap.",
        "charge_over_cap": f"The kernel's charge lies {size(charged - profile.cap_bytes)} above the cap.",
        "leak": "" if growth is None else growth_line(profile),
    }
    return [sentences[failure] for failure in profile.failures]


def advice_line(profile: Profile) -> str:
    """What to write into the configuration, in a sentence; empty where an older report does not tell."""
    worst, cap = profile.worst_case, cap_setting(profile.cap_bytes)
    if worst is None:
        return ""
    if "leak" in profile.failures:
        return "No cap is enough for long tasks of this work: memory grows with each step."
    if profile.killed:
        larger = cap_setting(-(-3 * profile.cap_bytes // (16 * MIB)) * 8 * MIB)
        return f"Do not set {cap} for this work: the worker was ended there. Profile it again with {larger}."
    smallest = f"the smallest cap that works is {whole_size(worst.smallest_cap_bytes)}, as predicted"
    if worst.smallest_cap_bytes == worst.advised_cap_bytes:
        smallest = "smaller caps do not work, as predicted"
    advised = cap_setting(worst.advised_cap_bytes)
    if profile.failures or not worst.fits:
        return f"{cap} is too small for this work. Set {advised}; {smallest}."
    return f"You can set {advised} for this work; {smallest}."


def cap_setting(cap_bytes: int) -> str:
    """A cap as an operator writes it into device.toml."""
    return f'cap = "{cap_bytes // MIB}M"'


def basis_line(profile: Profile) -> str:
    """What the verdict rests on: the rows that were there, and what the task's limit would add."""
    work, worst = profile.work, profile.worst_case
    if worst is None:
        return ""
    measured = f"{plural(work.batch_size, 'example')} a step, of at most {plural(work.sequence, 'token')}"
    if (work.batch_size, work.sequence) == (worst.batch_size, worst.sequence):
        return f"This {profile.verdict} was measured at the task's own limits: {measured}."
    limits = f"{plural(worst.batch_size, 'example')} of {plural(worst.sequence, 'token')}"
    fits = "which fits" if worst.fits else "which does not fit"
    given_up = f", with {' and '.join(worst.gave_up)}" if worst.gave_up and worst.fits else ""
    return (
        f"This {profile.verdict} rests on what was measured: {measured}. At the task's limits, {limits}, the plan "
        f"predicts {size(worst.predicted_peak_bytes)}, {fits}{given_up}."
    )


def enforcement_line(profile: Profile) -> str:
    """The means that held the worker to the cap."""
    note = f" {profile.enforcement_note}" if profile.enforcement_note else ""
    return f"Enforced: {_ENFORCERS[profile.enforced_by]}.{note}"


def charge_line(profile: Profile) -> str:
    """The kernel's charge as a second figure, and the cause of the gap between the two."""
    charged = profile.charged_peak_bytes
    if charged is None:
        return (
            "There is no second figure: the kernel's own charge was not available here, so the peak rests "
            "on resident memory alone."
        )
    gap = charged - profile.peak_bytes
    start = f"The kernel charged {size(charged)} at the most"
    if gap == 0:
        return f"{start}, exactly the measured peak."
    if gap < 0:
        return (
            f"{start}, {size(-gap)} less than the measured peak. As a rule these are pages of files that "
            f"another process read first, such as libraries: they count in the peak and are charged elsewhere."
        )
    return (
        f"{start}, {size(gap)} more than the measured peak. As a rule this is what the kernel keeps "
        f"for the worker: cached file pages, page tables and socket buffers."
    )


def prediction_line(profile: Profile) -> str:
    """How far the prediction was off."""
    if profile.killed:
        return f"Predicted {size(profile.predicted_peak_bytes)}; the worker was ended before it was done."
    error = profile.prediction_error
    side = "above" if error >= 0 else "below"
    return f"Predicted {size(profile.predicted_peak_bytes)}: {share(abs(error))} {side} the measured peak."


def unexplained_line(profile: Profile) -> str:
    """Whether the bins account for the peak."""
    if not profile.is_split:
        return "No part was measured."
    rest, part = profile.unexplained_bytes, abs(profile.unexplained_share)
    limit = f"{UNEXPLAINED_SHARE:.0%}".replace("%", " %")
    kind = "belongs to none of its parts" if rest >= 0 else "is counted in more than one part"
    text = f"{size(abs(rest))} of the peak ({share(part)}) {kind}"
    if profile.is_explained:
        return f"{text}: below {limit}, the parts account for the peak."
    return f"{text}: {limit} or more, so the parts do not account for the peak. Read them with care."


def timeline_line(profile: Profile) -> str:
    """What sampling saw of the peak, and what it missed."""
    highest = profile.highest_sample
    if highest is None:
        return "No timeline was taken."
    missed = profile.peak_bytes - highest.resident_bytes
    line = (
        f"Highest sample: {size(highest.resident_bytes)} after {duration(highest.seconds)}, "
        f"in phase {highest.phase}."
    )
    if missed <= 0:
        return line
    return f"{line} The peak is {size(missed)} above it: no sample fell on the peak."


def growth_line(profile: Profile) -> str:
    """The outcome of the leak check."""
    growth = profile.growth
    if growth is None:
        return "No leak check was run."
    found = "Memory grows with each step" if growth.leaks else "No leak"
    slope = growth.per_step_bytes / 1024
    return (
        f"{found}: {size(growth.first_bytes)} of the worker's own memory after the first of {growth.steps} steps, "
        f"{size(growth.last_bytes)} after the last; {slope:+.2f} KiB a step, "
        f"limit {growth.limit_per_step_bytes / 1024:.2f} KiB."
        + (f" The {growth.warm_up} steps before them are warm-up." if growth.warm_up else "")
    )


def measuring_line(profile: Profile) -> str:
    """What measuring cost."""
    cost = profile.measuring
    note = f" {cost.note}" if cost.note else ""
    return f"{cost.samples} samples took {duration(cost.seconds)} in all.{note}"


def identity_rows(profile: Profile) -> list[tuple[str, str]]:
    """What was measured, and on which machine, as pairs of name and value."""
    identity, work = profile.identity, profile.work
    return [
        ("device", f"{identity.device}, {size(identity.memory_bytes)} memory"),
        ("processor", f"{identity.cpu}, {plural(work.threads, 'thread')}"),
        ("kernel", f"{identity.kernel}, pages of {identity.page_size_bytes} bytes"),
        ("runtime", f"edge-runtime {identity.runtime_version}, {identity.engine}"),
        ("package", f"{identity.package_name}, sha256 {identity.package_sha256}"),
        ("arithmetic", identity.arithmetic),
        (
            "work",
            f"{plural(work.steps, 'step')} of {plural(work.batch_size, 'example')}, {work.micro_batch} at a time; "
            f"{plural(work.sequence, 'token')}; {gradient_words(work.update, work.draws)}; weights {work.weights}",
        ),
        ("slices", ", ".join(work.slices) or "none"),
        ("given up to fit", ", ".join(work.gave_up) or "nothing"),
        ("step", duration(profile.step_s) if profile.step_s is not None else "no step was finished"),
        ("measured", profile.created),
        *(("note", note) for note in profile.notes),
    ]


def gradient_words(update: Update, draws: int) -> str:
    """The way to the slices' gradient, in words."""
    return "backpropagation" if update == "backprop" else plural(draws, "draw")


def option_verdict(option: WhatIf) -> str:
    """Whether an option fits the cap, and whether it is the one that was run."""
    return ("fits" if option.fits else "does not fit") + (", chosen" if option.chosen else "")


def difference_line(difference: Difference) -> str:
    """Whether the peak grew by more than the tolerance."""
    peak, tolerance = difference.peak, share(difference.tolerance)
    change = f"{change_size(peak.old, 'bytes')} before, {change_size(peak.new, 'bytes')} now"
    grown = "" if peak.share is None else f" ({share(peak.share, signed=True)})"
    if difference.regressed:
        return f"REGRESSED: the peak grew by more than {tolerance}: {change}{grown}."
    return f"No regression: the peak stays within {tolerance}: {change}{grown}."


def change_size(value: float | None, unit: str) -> str:
    """One figure of a change."""
    if value is None:
        return NOT_MEASURED
    return size(value) if unit == "bytes" else duration(value)


def change_verdict(change: Change, tolerance: float) -> str:
    """How a figure changed, in a word or two."""
    if change.old is None or change.new is None:
        return "not in both"
    if change.grew(tolerance):
        return "grew"
    return "shrank" if change.old - change.new > abs(change.old) * tolerance else "same"


def row_note(profile: Profile, row: LedgerRow) -> str:
    """A bin's own note; for the unexplained rest, its share of the peak."""
    if row.name != UNEXPLAINED:
        return row.note
    if not profile.is_split:
        return "no part was measured"
    return f"{share(profile.unexplained_share)} of the peak" + ("" if profile.is_explained else ": too much")


def render_text(profile: Profile, difference: Difference | None = None) -> str:
    """The whole report as plain text that ends with a newline.

    Args:
        profile: the report.
        difference: comparison with an earlier report, from :func:`edge_runtime.profile.document.compare`; None without
            one.
    """
    return "\n".join(line.rstrip() for line in _lines(profile, difference)) + "\n"


def _lines(profile: Profile, difference: Difference | None) -> Iterator[str]:
    yield from _verdict(profile)
    if difference is not None:
        yield from _difference(difference)
    yield from _identity(profile)
    yield from _bins(profile)
    yield from _timeline(profile)
    yield from _phases(profile)
    yield from _tensors(profile)
    yield from _what_if(profile)
    yield from _heading("Leak check")
    yield from _wrapped(growth_line(profile), "  ", first="  ")
    yield from _comparisons(profile)
    yield from _heading("What measuring cost")
    yield from _wrapped(measuring_line(profile), "  ", first="  ")


def _verdict(profile: Profile) -> Iterator[str]:
    yield from _wrapped(f"{profile.verdict}  {verdict_line(profile)}", "      ")
    lines = (
        *failure_lines(profile),
        enforcement_line(profile),
        charge_line(profile),
        prediction_line(profile),
        basis_line(profile),
        advice_line(profile),
    )
    for line in filter(None, lines):
        yield from _wrapped(line, "      ", first="      ")


def _identity(profile: Profile) -> Iterator[str]:
    yield from _heading("What was measured (1 MiB is 2^20 bytes, 1 KiB is 2^10 bytes)")
    for name, value in identity_rows(profile):
        yield from _wrapped(value, " " * 19, first=f"  {name:<17}")
    yield from _command(profile.identity.command)


def _bins(profile: Profile) -> Iterator[str]:
    yield from _heading("Predicted against measured, in MiB")
    rows = [
        (row.name, column_mib(row.predicted_bytes), column_mib(row.measured_bytes), row_note(profile, row))
        for row in profile.ledger
    ]
    peak = ("peak", column_mib(profile.predicted_peak_bytes), column_mib(profile.peak_bytes), "")
    yield from table(("part", "predicted", "measured", "note"), [*rows, peak], "lrrl")
    yield from _wrapped(unexplained_line(profile), "  ", first="  ")


def _timeline(profile: Profile) -> Iterator[str]:
    """One character for each stretch of time, one level for each eighth of the cap."""
    yield from _heading("Over time, against the cap")
    samples = thin(profile.timeline, COLUMNS - 10)
    if samples:
        levels = [min(7, 8 * s.resident_bytes // profile.cap_bytes) for s in samples]
        yield "  " + "".join(_LEVELS[level] for level in levels)
    yield from _wrapped(timeline_line(profile), "  ", first="  ")


def _phases(profile: Profile) -> Iterator[str]:
    if not profile.phases:
        return
    yield from _heading("Peak of each phase, in MiB")
    rows = [
        (
            phase.name,
            column_mib(phase.peak_bytes),
            share(phase.peak_bytes / profile.cap_bytes),
            duration(phase.seconds),
            "owns the peak" if phase is profile.owner else "",
        )
        for phase in profile.phases
    ]
    yield from table(("phase", "peak", "of the cap", "took", ""), rows, "lrrrl")


def _tensors(profile: Profile) -> Iterator[str]:
    if not profile.tensors:
        return
    yield from _heading("Largest tensors at the peak, in MiB")
    rows = [
        (t.what or t.name, column_mib(t.bytes), t.shape, f"{t.program}: {t.name} ({t.operator})")
        for t in profile.tensors
    ]
    yield from table(("tensor", "MiB", "shape", "name in the package"), rows, "lrll")


def _what_if(profile: Profile) -> Iterator[str]:
    if not profile.what_if:
        return
    yield from _heading("What fits: other sizes, as predicted, in MiB")
    yield from edge_lines(profile.edges)
    yield from option_lines(profile.what_if)


def _comparisons(profile: Profile) -> Iterator[str]:
    if not profile.comparisons:
        return
    yield from _heading("Compared with other ways, in MiB")
    rows = [(c.name, column_mib(c.peak_bytes), duration(c.step_s), c.note) for c in profile.comparisons]
    yield from table(("way", "peak", "step", "note"), rows, "lrrl")


def edge_lines(edges: Sequence[Edge]) -> Iterator[str]:
    """How far each size may go, as a table and an empty line; nothing without any."""
    if not edges:
        return
    rows = [(*edge_cells(edge),) for edge in edges]
    yield from table(("", "largest that fits", "peak", "first that does not", "peak"), rows, "lrrrr")
    yield ""


EDGE_NAMES = {
    "batch_size": "examples of a step",
    "sequence": "tokens of a row",
    "draws": "draws of an example",
}


def edge_cells(edge: Edge) -> tuple[str, str, str, str, str]:
    """A size's name, the largest value that fits, its peak in MiB, the first that does not fit, and its peak."""
    largest, first_over = edge.largest, edge.first_over
    return (
        EDGE_NAMES[edge.size],
        "none" if largest is None else f"{getattr(largest, edge.size):,}",
        "" if largest is None else column_mib(largest.predicted_peak_bytes),
        f"all up to {edge.bound:,} fit" if first_over is None else f"{getattr(first_over, edge.size):,}",
        "" if first_over is None else column_mib(first_over.predicted_peak_bytes),
    )


def option_lines(options: Sequence[WhatIf]) -> Iterator[str]:
    """Options as a table with a header and a line for each; peaks in MiB."""
    rows = [(*map(str, option_cells(option)), option_verdict(option)) for option in options]
    header = ("batch", "at a time", "tokens", "draws", "slices", "weights", "peak", "step", "")
    yield from table(header, rows, "rrrrrlrrl")


def option_cells(option: WhatIf) -> tuple[int | str, ...]:
    """An option's sizes, its predicted peak in MiB and its predicted step time."""
    return (
        option.batch_size,
        option.micro_batch,
        option.sequence,
        option.draws
        if option.draws_at_a_time in {0, option.draws}
        else f"{option.draws} by {option.draws_at_a_time}",
        option.slices,
        option.weights,
        column_mib(option.predicted_peak_bytes),
        duration(option.predicted_step_s),
    )


def _difference(difference: Difference) -> Iterator[str]:
    yield from _heading(f"Against the report of {difference.old_created}")
    yield from _wrapped(difference_line(difference), "  ", first="  ")
    for note in difference.notes:
        yield from _wrapped(note, "    ", first="  ! ")
    yield from table(
        ("", "before", "now", "change", ""),
        [
            (
                change.name,
                change_size(change.old, change.unit),
                change_size(change.new, change.unit),
                "" if change.share is None else share(change.share, signed=True),
                change_verdict(change, difference.tolerance),
            )
            for change in difference.changes
        ],
        "lrrrl",
    )


def _heading(title: str) -> Iterator[str]:
    yield ""
    yield title
    yield "-" * len(title)


def _command(command: str) -> list[str]:
    """The command in lines that a shell reads as one."""
    *lines, last = _wrapped(command, " " * 19, first="  to repeat        ", columns=COLUMNS - 2)
    return [*(line + " \\" for line in lines), last]


def _wrapped(text: str, indent: str, *, first: str = "", columns: int = COLUMNS) -> list[str]:
    wrapper = textwrap.TextWrapper(
        columns, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
    )
    return wrapper.wrap(text) or [first]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """Aligned columns. Where they are too wide together, the widest are cut.

    Args:
        header: head of each column.
        rows: cells of each row.
        sides: side to which each column is aligned, a letter l or r for each.
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    while sum(widths) + 2 * len(widths) > COLUMNS:
        widest = max(range(len(widths)), key=lambda index: widths[index])
        widths[widest] -= 1
    for line in lines:
        cells = (
            _cut(cell, width).rjust(width) if side == "r" else _cut(cell, width).ljust(width)
            for cell, width, side in zip(line, widths, sides, strict=True)
        )
        yield "  " + "  ".join(cells)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
