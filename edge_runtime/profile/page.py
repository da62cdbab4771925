"""The memory-budget report as one HTML file that needs nothing else: no script, no font, no network.

The content policy in its head forbids every outside resource, so what is written here is all that is shown. Every text
that comes from the report is escaped. Figures appear both as drawing and as text, and nothing is told by colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from edge_runtime.figures import column_mib, duration, plural, share, size
from edge_runtime.html.style import STYLE
from edge_runtime.profile.charts import comparison_bars, gauge, timeline, waterfall
from edge_runtime.profile.document import Difference, LedgerRow, Profile
from edge_runtime.profile.text import (
    change_size,
    change_verdict,
    charge_line,
    difference_line,
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

_WIDE, _SMALL = 880, 340
_UNITS = re.compile(r"(?<=\d) (?=(?:MiB|KiB|ms|µs|s)\b|%)")

#: Patterns, shared by all drawings of the page.
_PATTERNS = "".join(
    f'<pattern id="hatch-{name}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate({turn})">'
    f'<rect width="6" height="6" style="fill:var(--{colour});fill-opacity:{ground}"/>'
    f'<rect width="2.2" height="6" style="fill:var(--{colour})"/></pattern>'
    for name, colour, turn, ground in (
        ("predicted", "predicted", 45, ".12"),
        ("rest", "rest", -45, ".15"),
        ("file", "file", 45, ".45"),
        ("over", "cap", -45, ".15"),
    )
)


def render_page(profile: Profile, difference: Difference | None = None) -> str:
    """The whole report as one HTML document.

    Args:
        profile: the report.
        difference: comparison with an earlier report, from :func:`edge_runtime.profile.document.compare`; None without
            one.
    """
    title = f"{profile.verdict}: {verdict_line(profile)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><svg class="defs" aria-hidden="true"><defs>{_PATTERNS}</defs></svg>
<main>
{_verdict(profile)}
{_difference(difference) if difference is not None else ""}
{_identity(profile)}
{_waterfall(profile)}
{_timeline(profile)}
{_phases(profile)}
{_tensors(profile)}
{_what_if(profile)}
{_growth(profile)}
{_comparisons(profile)}
{_measuring(profile)}
</main></body></html>
"""


def _verdict(profile: Profile) -> str:
    passed = profile.verdict == "PASS"
    failures = "".join(f"<li>{_prose(line)}</li>" for line in failure_lines(profile))
    return f"""<header>
<h1>Memory budget of {escape(profile.identity.package_name)} on {escape(profile.identity.device)}</h1>
<div class="verdict {"pass" if passed else "fail"}">
<p class="word">{"✓" if passed else "✕"} {profile.verdict}</p>
<p class="figure">{_prose(_capital(verdict_line(profile)))}</p>
{f'<ul class="failures">{failures}</ul>' if failures else ""}
{gauge(profile)}
{_key(*_gauge_key(profile))}
<p class="lead">{_prose(enforcement_line(profile))} {_prose(charge_line(profile))}</p>
</div>
{_tiles(profile)}
</header>"""


def _gauge_key(profile: Profile) -> list[tuple[str, str]]:
    charge = [] if profile.charged_peak_bytes is None else [("charge", "charged by the kernel")]
    return [
        ("measured", "high-water mark (VmHWM)"),
        ("predicted-mark", "predicted"),
        *charge,
        ("cap solid", "cap"),
    ]


def _tiles(profile: Profile) -> str:
    owner, charged, left = profile.owner, profile.charged_peak_bytes, profile.headroom_bytes
    tiles = (
        ("Headroom", size(left), "left under the cap")
        if left >= 0
        else ("Headroom", "none", f"{size(-left)} over the cap"),
        ("Kernel's charge", "not available" if charged is None else size(charged), "the second figure"),
        (
            "Prediction",
            share(profile.prediction_error, signed=True),
            f"predicted {size(profile.predicted_peak_bytes)}",
        )
        if not profile.killed
        else ("Prediction", size(profile.predicted_peak_bytes), "not reached"),
        (
            "Unexplained",
            share(profile.unexplained_share),
            "accounted for" if profile.is_explained else "too much: see the bins",
        )
        if profile.is_split
        else ("Unexplained", "all of it", "no bin was measured"),
        ("Peak owned by", "not known" if owner is None else owner.name, "phase"),
        ("Step", "none", "no step was finished")
        if profile.step_s is None
        else ("Step", duration(profile.step_s), plural(profile.work.batch_size, "example")),
    )
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _difference(difference: Difference) -> str:
    rows = []
    for change in difference.changes:
        verdict = change_verdict(change, difference.tolerance)
        cells = (
            change_size(change.old, change.unit),
            change_size(change.new, change.unit),
            "" if change.share is None else share(change.share, signed=True),
        )
        rows.append(
            _row(change.name, cells, verdict, kind="grew" if verdict == "grew" else "", bad=verdict == "grew")
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in difference.notes)
    tone = "bad" if difference.regressed else "good"
    return _section(
        "Against an earlier report",
        _told(difference_line(difference), tone)
        + (f'<p class="lead">What else differs between the two:</p><ul>{notes}</ul>' if notes else "")
        + _table(
            f"Report of {difference.old_created} beside this one",
            ("figure", "before", "now", "change", "verdict"),
            rows,
            numbers=(1, 2, 3),
        ),
    )


def _identity(profile: Profile) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_prose(value)}</td></tr>'
        for name, value in identity_rows(profile)
    )
    # A word of the command is never broken, so that an option stays readable.
    words = " ".join(f"<span>{escape(word)}</span>" for word in profile.identity.command.split(" "))
    return _section(
        "What was measured",
        f'<div class="scroll"><table class="identity"><caption>Sizes on this page are in MiB (2<sup>20</sup> bytes), '
        f"small ones in KiB (2<sup>10</sup> bytes).</caption><tbody>{rows}</tbody></table></div>"
        f'<p class="lead">To repeat it:</p><pre tabindex="0"><code>{words}</code></pre>',
    )


def _waterfall(profile: Profile) -> str:
    total = LedgerRow("peak", profile.predicted_peak_bytes, profile.peak_bytes, "")
    rows = [
        _row(row.name, (column_mib(row.predicted_bytes), column_mib(row.measured_bytes)), note, kind=kind)
        for row, note, kind in (
            *((row, row_note(profile, row), "") for row in profile.ledger),
            (total, prediction_line(profile), "total"),
        )
    ]
    return _section(
        "Predicted against measured",
        f'<p class="lead">{_prose(prediction_line(profile))} {_prose(unexplained_line(profile))}</p>'
        + _figure(
            _key(
                ("predicted", "predicted"),
                ("measured", "measured"),
                ("measured rest", "unexplained"),
                ("cap", "cap"),
            ),
            waterfall(profile, _WIDE) + waterfall(profile, _SMALL),
        )
        + "<details><summary>The bins as a table, with notes</summary>"
        + _table(
            "Predicted and measured memory by bin, in MiB",
            ("bin", "predicted", "measured", "note"),
            rows,
            numbers=(1, 2),
        )
        + "</details>",
    )


def _timeline(profile: Profile) -> str:
    drawings = timeline(profile, _WIDE) + timeline(profile, _SMALL)
    key = _key(
        ("anonymous", "anonymous"),
        ("file", "file-backed"),
        ("mark", "high-water mark (VmHWM)"),
        ("cap", "cap"),
        ("peak", "highest sample"),
    )
    return _section(
        "Over time",
        f'<p class="lead">{_prose(timeline_line(profile))}</p>'
        + (_figure(key, drawings) if drawings else ""),
    )


def _phases(profile: Profile) -> str:
    rows = [
        _row(
            phase.name,
            (
                column_mib(phase.peak_bytes),
                share(phase.peak_bytes / profile.cap_bytes),
                duration(phase.seconds),
            ),
            "owns the peak" if phase is profile.owner else "",
            kind="owner" if phase is profile.owner else "",
            spark=min(1.0, phase.peak_bytes / profile.cap_bytes),
        )
        for phase in profile.phases
    ]
    table = _table(
        "High-water mark of each phase, in MiB",
        ("phase", "peak", "of the cap", "took", ""),
        rows,
        numbers=(1, 2, 3),
    )
    return _section("Peak of each phase", table if rows else "<p>No phase was measured.</p>")


def _tensors(profile: Profile) -> str:
    most = max((tensor.bytes for tensor in profile.tensors), default=0) or 1
    rows = [
        f'<tr><th scope="row">{escape(t.name)}</th>'
        f'<td class="n">{escape(column_mib(t.bytes))}{_spark(t.bytes / most)}</td>'
        f"<td>{escape(t.shape)}</td><td>{escape(t.operator)}</td><td>{escape(t.program)}</td></tr>"
        for t in profile.tensors
    ]
    table = _table(
        "Alive at the peak, largest first, in MiB",
        ("tensor", "size", "shape", "operator", "program"),
        rows,
        numbers=(1,),
    )
    return _section("Largest tensors at the peak", table if rows else "<p>No tensors were recorded.</p>")


def _what_if(profile: Profile) -> str:
    rows = []
    for option in profile.what_if:
        kind = "chosen" if option.chosen else "" if option.fits else "no"
        cells = "".join(f'<td class="n">{escape(str(cell))}</td>' for cell in option_cells(option))
        mark = "▶ " if option.chosen else ""
        verdict = (
            f'<span class="tag {"good" if option.fits else "bad"}">{mark}{option_verdict(option)}</span>'
        )
        rows.append(f'<tr class="{kind}"><th scope="row">{verdict}</th>{cells}</tr>')
    header = ("within the cap", "batch", "at a time", "tokens", "draws", "slices", "weights", "peak", "step")
    table = _table("Other sizes of the work as predicted, peaks in MiB", header, rows, numbers=range(1, 9))
    return _section("What if", table if rows else "<p>No other sizes were predicted.</p>")


def _growth(profile: Profile) -> str:
    growth = profile.growth
    tone = "" if growth is None else "bad" if growth.leaks else "good"
    return _section("Leak check", _told(growth_line(profile), tone))


def _comparisons(profile: Profile) -> str:
    rows = [
        _row(
            way.name,
            (
                column_mib(way.peak_bytes),
                f"{way.peak_bytes / profile.peak_bytes:.2f} ×",
                duration(way.step_s),
            ),
            way.note,
        )
        for way in profile.comparisons
    ]
    if not rows:
        return _section("Other ways to do it", "<p>Nothing was compared.</p>")
    return _section(
        "Other ways to do it",
        _figure(
            _key(("way", "peak within the cap"), ("way over", "peak above the cap"), ("cap", "cap")),
            comparison_bars(profile, _WIDE) + comparison_bars(profile, _SMALL),
        )
        + _table(
            "Peak in MiB and step of each way",
            ("way", "peak", "of this peak", "step", "note"),
            rows,
            numbers=(1, 2, 3),
        ),
    )


def _measuring(profile: Profile) -> str:
    return _section("How it was measured", f"<p>{_prose(measuring_line(profile))}</p>")


def _told(line: str, tone: str) -> str:
    """A sentence whose verdict, up to the colon, stands out."""
    outcome, colon, rest = line.partition(":")
    return f'<p><span class="tag {tone}">{_prose(outcome + colon)}</span>{_prose(rest)}</p>'


def _prose(text: str) -> str:
    """Escaped text whose numbers stay on one line with their units."""
    return escape(_UNITS.sub("\u00a0", text))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _figure(key: str, drawings: str) -> str:
    return f'<figure class="box"><figcaption>{key}</figcaption>{drawings}</figure>'


def _key(*entries: tuple[str, str]) -> str:
    """The legend of a drawing."""
    return f'<ul class="key">{"".join(_key_entries(entries))}</ul>'


def _key_entries(entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    for kind, name in entries:
        if kind in ("peak", "charge"):
            sign = f'<circle class="{kind}" cx="13" cy="6.5" r="4.5"/>'
        elif kind in ("cap", "mark"):
            sign = f'<line class="{kind}" x1="0" x2="26" y1="6.5" y2="6.5"/>'
        elif kind in ("cap solid", "predicted-mark"):
            sign = f'<line class="{kind}" x1="13" x2="13" y1="0" y2="13"/>'
        else:
            sign = f'<rect class="{kind}" x="1" y="1" width="24" height="11"/>'
        yield f'<li><svg aria-hidden="true">{sign}</svg>{escape(name)}</li>'


def _table(caption: str, header: Sequence[str], rows: Sequence[str], *, numbers: Sequence[int]) -> str:
    heads = "".join(
        f'<th scope="col"{" class=n" if index in numbers else ""}>{escape(name)}</th>'
        if name
        else "<td></td>"
        for index, name in enumerate(header)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(
    name: str,
    cells: Sequence[str],
    note: str,
    *,
    kind: str = "",
    bad: bool = False,
    spark: float | None = None,
) -> str:
    numbers = [f'<td class="n">{escape(cell)}</td>' for cell in cells]
    if spark is not None:
        numbers[0] = f'<td class="n">{escape(cells[0])}{_spark(spark)}</td>'
    tag = f'<span class="tag bad">{escape(note)}</span>' if bad else escape(note)
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{"".join(numbers)}<td class="t">{tag}</td></tr>'


def _spark(part: float) -> str:
    return (
        '<svg class="spark" aria-hidden="true"><rect class="room" width="100%" height="100%"/>'
        f'<rect width="{100 * part:.1f}%" height="100%"/></svg>'
    )
