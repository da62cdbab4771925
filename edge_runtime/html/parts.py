"""The parts that the project's pages are made of: document, sections, tables, tiles, legends, the bar against the cap.

A page is one file that needs nothing else: no script, no font, no network. The content policy in its head forbids every
outside resource. On a telephone a table becomes a list of cards, so that no column is cut off. Nothing is told by
colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from edge_runtime.figures import size
from edge_runtime.html.style import STYLE

_UNITS = re.compile(r"(?<=\d) (?=(?:GiB|MiB|KiB|bytes|ms|µs|s|min|h)\b|%)")

#: Patterns, shared by all drawings of a page.
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


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        cells: HTML of each cell; the first one names the row. An empty cell is left out of a card.
        kind: class of the row; empty for a plain one.
    """

    cells: tuple[str, ...]
    kind: str = ""


def document(title: str, content: str) -> str:
    """A whole page.

    Args:
        title: title of the window, not yet escaped.
        content: HTML of the page.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><svg class="defs" aria-hidden="true"><defs>{_PATTERNS}</defs></svg>
<main>
{content}
</main></body></html>
"""


def prose(text: str) -> str:
    """Escaped text whose numbers stay on one line with their units."""
    return escape(_UNITS.sub("\u00a0", text))


def capital(text: str) -> str:
    """A text with a capital at its start."""
    return text[:1].upper() + text[1:]


def told(line: str, tone: str) -> str:
    """A sentence whose verdict, up to the colon, stands out.

    Args:
        line: the sentence.
        tone: ``good``, ``bad`` or empty.
    """
    outcome, colon, rest = line.partition(":")
    return f'<p><span class="tag {tone}">{prose(outcome + colon)}</span>{prose(rest)}</p>'


def section(title: str, content: str) -> str:
    """A part of the page under a heading."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def folded_section(title: str, content: str) -> str:
    """A part of the page that is opened by its heading."""
    return f"<section><details><summary><h2>{escape(title)}</h2></summary>{content}</details></section>"


def folded(title: str, content: str) -> str:
    """Something within a section that is opened by a line of text."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Figures side by side, each with its name above and a remark below."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{prose(value)}<small>{prose(note)}</small></dd></div>"
        for name, value, note in entries
    )
    return f'<dl class="tiles">{cells}</dl>'


def table(
    caption: str, header: Sequence[str], rows: Sequence[Row], *, numbers: Collection[int] = (), kind: str = ""
) -> str:
    """A table; a list of cards where the screen is narrow.

    Args:
        caption: what it shows.
        header: name of each column; the last may have none.
        rows: its rows.
        numbers: columns of figures, which stand right.
        kind: class of the whole table; empty for a plain one.
    """
    heads = "".join(
        f'<th scope="col"{" class=n" if index in numbers else ""}>{escape(name)}</th>'
        if name
        else "<td></td>"
        for index, name in enumerate(header)
    )
    body = "".join(
        f'<tr class="{row.kind}"><th scope="row">{row.cells[0]}</th>'
        + "".join(
            f'<td class="{"n" if index in numbers else "t"}" data-name="{escape(header[index])}">{cell}</td>'
            for index, cell in enumerate(row.cells[1:], 1)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="{f"scroll {kind}".strip()}" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(caption: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A table of names and values, without a header.

    Args:
        caption: what it shows.
        pairs: each name and its value, not yet escaped.
    """
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{prose(value)}</td></tr>' for name, value in pairs
    )
    return (
        f'<div class="facts"><table><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table></div>'
    )


def figure(legend: str, drawings: str) -> str:
    """Drawings with their legend."""
    return f'<figure class="box"><figcaption>{legend}</figcaption>{drawings}</figure>'


def key(*entries: tuple[str, str]) -> str:
    """The legend of a drawing: each kind of mark and its name."""
    return f'<ul class="key">{"".join(_key_entries(entries))}</ul>'


def _key_entries(entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    for kind, name in entries:
        if kind in ("peak", "charge"):
            sign = f'<circle class="{kind}" cx="13" cy="6.5" r="4.5"/>'
        elif kind in ("cap", "mark") or kind.startswith("line"):
            sign = f'<line class="{kind}" x1="0" x2="26" y1="6.5" y2="6.5"/>'
        elif kind in ("cap solid", "predicted-mark"):
            sign = f'<line class="{kind}" x1="13" x2="13" y1="0" y2="13"/>'
        else:
            sign = f'<rect class="{kind}" x="1" y="1" width="24" height="11"/>'
        yield f'<li><svg aria-hidden="true">{sign}</svg>{escape(name)}</li>'


def gauge(cap_bytes: int, peak_bytes: int, predicted_bytes: int, charged_bytes: int | None = None) -> str:
    """One bar: the measured peak within the cap, with the prediction and the kernel's charge as marks.

    Args:
        cap_bytes: size of the cap.
        peak_bytes: the measured peak.
        predicted_bytes: the predicted peak.
        charged_bytes: largest charge by the kernel; None draws none.
    """
    most = max(cap_bytes, peak_bytes, predicted_bytes, charged_bytes or 0)

    def at(count: int) -> str:
        return f"{100 * count / most:.2f}%"

    cap, peak, predicted = at(cap_bytes), at(peak_bytes), at(predicted_bytes)
    # What lies above the cap is hatched; below it, one bar covers the other.
    within = at(min(peak_bytes, cap_bytes))
    parts = [
        f'<rect class="room" x="0" y="6" width="{cap}" height="20" rx="3"/>',
        f'<rect class="way over" x="0" y="6" width="{peak}" height="20" rx="3"/>',
        f'<rect class="measured" x="0" y="6" width="{within}" height="20" rx="3"/>',
        f'<line class="predicted-mark" x1="{predicted}" x2="{predicted}" y1="2" y2="30"/>',
        f'<line class="cap solid" x1="{cap}" x2="{cap}" y1="0" y2="32"/>',
    ]
    if charged_bytes is not None:
        parts.append(f'<circle class="charge" cx="{at(charged_bytes)}" cy="16" r="5"/>')
    described = f"{size(peak_bytes)} of {size(cap_bytes)}, predicted {size(predicted_bytes)}"
    if charged_bytes is not None:
        described += f", charged by the kernel {size(charged_bytes)}"
    return (
        f'<svg class="gauge" width="100%" height="32" role="img" aria-label="{escape(described)}">'
        f"{''.join(parts)}</svg>"
    )


def gauge_key(*, charged: bool) -> str:
    """The legend of :func:`gauge`."""
    charge = [("charge", "charged by the kernel")] if charged else []
    return key(
        ("measured", "measured peak"), ("predicted-mark", "predicted peak"), *charge, ("cap solid", "cap")
    )
