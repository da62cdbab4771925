"""The memory-budget report as one HTML file that needs nothing else (:mod:`edge_runtime.html.parts`).

The advice comes first, then what the verdict rests on and how far each size may go; details are folded. Every text that
comes from the report is escaped. Figures appear both as drawing and as text, and nothing is told by colour alone.
"""

from __future__ import annotations

from html import escape

from edge_runtime.figures import column_mib, duration, plural, share, size
from edge_runtime.html.line_chart import NARROW, WIDE
from edge_runtime.html.parts import (
    Row,
    capital,
    document,
    facts,
    figure,
    folded,
    folded_section,
    gauge,
    gauge_key,
    key,
    prose,
    section,
    table,
    tiles,
    told,
)
from edge_runtime.memory.plan import USABLE_SHARE
from edge_runtime.profile.charts import comparison_bars, timeline, waterfall
from edge_runtime.profile.document import Difference, LedgerRow, Profile
from edge_runtime.profile.text import (
    advice_line,
    basis_line,
    change_size,
    change_verdict,
    charge_line,
    difference_line,
    edge_cells,
    enforcement_line,
    failure_lines,
    growth_line,
    identity_rows,
    measuring_line,
    option_cells,
    option_verdict,
    prediction_line,
    row_note,
    timeline_line,
    unexplained_line,
    verdict_line,
)

#: The first lines of this list of tensors stand open; all of them, with their names in the package, are folded.
_OPEN_TENSORS = 5


def render_page(profile: Profile, difference: Difference | None = None) -> str:
    """The whole report as one HTML document.

    Args:
        profile: the report.
        difference: comparison with an earlier report, from :func:`edge_runtime.profile.document.compare`; None without
            one.
    """
    return document(
        f"{profile.verdict}: {verdict_line(profile)}",
        "\n".join(
            (
                _verdict(profile),
                _difference(difference) if difference is not None else "",
                _limits(profile),
                _what_fits(profile),
                _waterfall(profile),
                _timeline(profile),
                _phases(profile),
                _tensors(profile),
                _growth(profile),
                _comparisons(profile),
                _identity(profile),
                _measuring(profile),
            )
        ),
    )


def _verdict(profile: Profile) -> str:
    passed = profile.verdict == "PASS"
    failures = "".join(f"<li>{prose(line)}</li>" for line in failure_lines(profile))
    advice, basis = advice_line(profile), basis_line(profile)
    return f"""<header>
<h1>Memory budget of {escape(profile.identity.package_name)} on {escape(profile.identity.device)}</h1>
<div class="verdict {"pass" if passed else "fail"}">
<p class="word">{"✓" if passed else "✕"} {profile.verdict}</p>
{f'<p class="figure">{prose(advice)}</p>' if advice else ""}
<p class="{"advice" if advice else "figure"}">{prose(capital(verdict_line(profile)))}</p>
{f'<ul class="failures">{failures}</ul>' if failures else ""}
{gauge(profile.cap_bytes, profile.peak_bytes, profile.predicted_peak_bytes, profile.charged_peak_bytes)}
{gauge_key(charged=profile.charged_peak_bytes is not None)}
{f'<p class="basis">{prose(basis)}</p>' if basis else ""}
<p class="lead">{prose(enforcement_line(profile))} {prose(charge_line(profile))}</p>
</div>
{_tiles(profile)}
</header>"""


def _tiles(profile: Profile) -> str:
    owner, charged, left = profile.owner, profile.charged_peak_bytes, profile.headroom_bytes
    return tiles(
        (
            ("Headroom", size(left), "left under the cap")
            if left >= 0
            else ("Headroom", "none", f"{size(-left)} over the cap"),
            ("Kernel's charge", "not available" if charged is None else size(charged), "the second figure"),
            ("Prediction", size(profile.predicted_peak_bytes), "not reached")
            if profile.killed
            else (
                "Prediction",
                share(profile.prediction_error, signed=True),
                f"predicted {size(profile.predicted_peak_bytes)}",
            ),
            (
                "Unexplained",
                share(profile.unexplained_share),
                "accounted for" if profile.is_explained else "too much: see the parts",
            )
            if profile.is_split
            else ("Unexplained", "all of it", "no part was measured"),
            ("Peak owned by", "not known" if owner is None else owner.name, "phase"),
            ("Step", "none", "no step was finished")
            if profile.step_s is None
            else ("Step", duration(profile.step_s), plural(profile.work.batch_size, "example")),
        )
    )


def _difference(difference: Difference) -> str:
    rows = []
    for change in difference.changes:
        verdict = change_verdict(change, difference.tolerance)
        grew = verdict == "grew"
        cells = (
            escape(change.name),
            prose(change_size(change.old, change.unit)),
            prose(change_size(change.new, change.unit)),
            "" if change.share is None else prose(share(change.share, signed=True)),
            f'<span class="tag bad">{verdict}</span>' if grew else verdict,
        )
        rows.append(Row(cells, "grew" if grew else ""))
    notes = "".join(f"<li>{escape(note)}</li>" for note in difference.notes)
    return section(
        "Against an earlier report",
        told(difference_line(difference), "bad" if difference.regressed else "good")
        + (f'<p class="lead">What else differs between the two:</p><ul>{notes}</ul>' if notes else "")
        + table(
            f"Report of {difference.old_created} beside this one",
            ("figure", "before", "now", "change", "verdict"),
            rows,
            numbers=(1, 2, 3),
        ),
    )


def _limits(profile: Profile) -> str:
    """What was measured beside the task's limits, where the two differ."""
    work, worst = profile.work, profile.worst_case
    if worst is None:
        return ""
    measured = (work.batch_size, work.sequence, profile.peak_bytes, not profile.failures)
    limits = (worst.batch_size, worst.sequence, worst.predicted_peak_bytes, worst.fits)
    if measured[:2] == limits[:2]:
        return ""
    rows = [
        Row(
            (
                name,
                f"{examples:,}",
                f"{tokens:,}",
                column_mib(peak),
                prose(share(peak / profile.cap_bytes)),
                _fits(fits=fits),
            )
        )
        for name, (examples, tokens, peak, fits) in (
            ("measured", measured),
            ("at the task's limits, predicted", limits),
        )
    ]
    return section(
        "What the verdict rests on",
        table(
            "The measured step beside the largest that the task allows, peaks in MiB",
            ("step", "examples", "tokens", "peak", "of the cap", ""),
            rows,
            numbers=range(1, 5),
        ),
    )


def _what_fits(profile: Profile) -> str:
    """The edge of what fits, and all sizes that were predicted, folded."""
    edges = [Row(tuple(prose(cell) for cell in edge_cells(edge))) for edge in profile.edges]
    lead = (
        f"One size is varied at a time, in doublings, the others as in this run; each peak is predicted, and may "
        f"take {share(USABLE_SHARE)} of the cap."
    )
    rows = []
    for option in profile.what_if:
        kind = "chosen" if option.chosen else "" if option.fits else "no"
        mark = "▶ " if option.chosen else ""
        verdict = (
            f'<span class="tag {"good" if option.fits else "bad"}">{mark}{option_verdict(option)}</span>'
        )
        rows.append(Row((verdict, *(prose(str(cell)) for cell in option_cells(option))), kind))
    header = ("within the cap", "batch", "at a time", "tokens", "draws", "slices", "weights", "peak", "step")
    grid = table("Other sizes of the work as predicted, peaks in MiB", header, rows, numbers=range(1, 9))
    return section(
        "What fits",
        (
            f'<p class="lead">{prose(lead)}</p>'
            + table(
                "The largest sizes that fit and the first that do not, peaks in MiB",
                ("size", "largest that fits", "its peak", "first that does not fit", "its peak"),
                edges,
                numbers=range(1, 5),
            )
            if edges
            else ""
        )
        + (
            folded(f"All {len(rows)} sizes that were predicted", grid)
            if rows
            else "<p>No other sizes were predicted.</p>"
        ),
    )


def _fits(*, fits: bool) -> str:
    return f'<span class="tag {"good" if fits else "bad"}">{"fits" if fits else "does not fit"}</span>'


def _waterfall(profile: Profile) -> str:
    total = LedgerRow("peak", profile.predicted_peak_bytes, profile.peak_bytes, "")
    rows = [
        Row(
            (
                escape(row.name),
                column_mib(row.predicted_bytes),
                column_mib(row.measured_bytes),
                prose(note),
            ),
            kind,
        )
        for row, note, kind in (
            *((row, row_note(profile, row), "") for row in profile.ledger),
            (total, prediction_line(profile), "total"),
        )
    ]
    return section(
        "Predicted against measured",
        f'<p class="lead">{prose(prediction_line(profile))} {prose(unexplained_line(profile))}</p>'
        + figure(
            key(
                ("predicted", "predicted"),
                ("measured", "measured"),
                ("measured rest", "unexplained"),
                ("cap", "cap"),
            ),
            waterfall(profile, WIDE) + waterfall(profile, NARROW),
        )
        + folded(
            "What each part is, as a table",
            table(
                "Predicted and measured memory by part, in MiB",
                ("part", "predicted", "measured", "what it is"),
                rows,
                numbers=(1, 2),
            ),
        ),
    )


def _timeline(profile: Profile) -> str:
    drawings = timeline(profile, WIDE) + timeline(profile, NARROW)
    legend = key(
        ("anonymous", "the worker's own memory"),
        ("file", "files it has mapped"),
        ("mark", "peak"),
        ("cap", "cap"),
        ("peak", "highest sample"),
    )
    return section(
        "Over time",
        f'<p class="lead">{prose(timeline_line(profile))}</p>'
        + (figure(legend, drawings) if drawings else ""),
    )


def _phases(profile: Profile) -> str:
    rows = [
        Row(
            (
                escape(phase.name),
                column_mib(phase.peak_bytes) + _spark(min(1.0, phase.peak_bytes / profile.cap_bytes)),
                prose(share(phase.peak_bytes / profile.cap_bytes)),
                prose(duration(phase.seconds)),
                "owns the peak" if phase is profile.owner else "",
            ),
            "owner" if phase is profile.owner else "",
        )
        for phase in profile.phases
    ]
    if not rows:
        return section("Peak of each phase", "<p>No phase was measured.</p>")
    shown = table(
        "Peak of each phase, in MiB", ("phase", "peak", "of the cap", "took", ""), rows, numbers=(1, 2, 3)
    )
    return folded_section("Peak of each phase", shown)


def _tensors(profile: Profile) -> str:
    if not profile.tensors:
        return section("Largest tensors at the peak", "<p>No tensors were recorded.</p>")
    most = max(tensor.bytes for tensor in profile.tensors) or 1
    rows = [
        Row(
            (
                escape(t.what or t.name),
                column_mib(t.bytes) + _spark(t.bytes / most),
                escape(t.shape),
            )
        )
        for t in profile.tensors[:_OPEN_TENSORS]
    ]
    named = [
        Row(
            (
                escape(t.name),
                column_mib(t.bytes),
                escape(t.what),
                escape(t.shape),
                escape(t.operator),
                escape(t.program),
            )
        )
        for t in profile.tensors
    ]
    return folded_section(
        "Largest tensors at the peak",
        table(
            f"The largest {len(rows)} that are alive at once, in MiB",
            ("what it is", "size", "shape"),
            rows,
            numbers=(1,),
        )
        + folded(
            "All of them, with their names in the package's programs",
            table(
                "Alive at the peak, largest first, in MiB",
                ("name", "size", "what it is", "shape", "operator", "program"),
                named,
                numbers=(1,),
            ),
        ),
    )


def _growth(profile: Profile) -> str:
    growth = profile.growth
    tone = "" if growth is None else "bad" if growth.leaks else "good"
    return section("Leak check", told(growth_line(profile), tone))


def _comparisons(profile: Profile) -> str:
    rows = [
        Row(
            (
                escape(way.name),
                column_mib(way.peak_bytes),
                f"{way.peak_bytes / profile.peak_bytes:.2f} ×",
                prose(duration(way.step_s)),
                prose(way.note),
            )
        )
        for way in profile.comparisons
    ]
    if not rows:
        return section("Other ways to do it", "<p>Nothing was compared.</p>")
    return section(
        "Other ways to do it",
        figure(
            key(("way", "peak within the cap"), ("way over", "peak above the cap"), ("cap", "cap")),
            comparison_bars(profile, WIDE) + comparison_bars(profile, NARROW),
        )
        + folded(
            "The same as a table",
            table(
                "Peak in MiB and step of each way",
                ("way", "peak", "of this peak", "step", "note"),
                rows,
                numbers=(1, 2, 3),
            ),
        ),
    )


def _identity(profile: Profile) -> str:
    # A word of the command is never broken, so that an option stays readable.
    words = " ".join(f"<span>{escape(word)}</span>" for word in profile.identity.command.split(" "))
    return folded_section(
        "What was measured, and how to repeat it",
        facts("Machine, package and work", identity_rows(profile))
        + f'<p class="lead">To repeat it:</p><pre tabindex="0"><code>{words}</code></pre>',
    )


def _measuring(profile: Profile) -> str:
    words = (
        "Sizes on this page are in MiB (2^20 bytes), small ones in KiB (2^10 bytes). The peak is the most memory that "
        "the worker had in RAM at once, as the kernel counts it: peak resident memory, VmHWM in /proc. The kernel's "
        "charge is what it counted against the cap."
    )
    return folded_section(
        "How it was measured", f"<p>{prose(words)}</p><p>{prose(measuring_line(profile))}</p>"
    )


def _spark(part: float) -> str:
    return (
        '<svg class="spark" aria-hidden="true"><rect class="room" width="100%" height="100%"/>'
        f'<rect width="{100 * part:.1f}%" height="100%"/></svg>'
    )
