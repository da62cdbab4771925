"""``comparison.html``: curves and table of all arms, in one file that loads nothing from the network."""

from __future__ import annotations

from html import escape

from coordinator.simulation.report.comparison import ArmComparison
from coordinator.simulation.report.curves import AXES, COLOURS, chart, dash
from coordinator.simulation.report.table import WORDS, cells, columns, denominator_text, groups_text
from edge_runtime.html.parts import Row, table
from edge_runtime.html.style import STYLE

_WIDE, _NARROW = 900, 380
_LIGHT = ("#0f766e", "#b3261e", "#3d57b8", "#b07a16", "#8a4b9c", "#17683a", "#5b6670", "#a8326a")
_DARK = ("#3fb6a8", "#ff8a7d", "#7f95f2", "#d9a84c", "#cf9be0", "#63d293", "#a3afba", "#f08fbf")
_STYLE = (
    "\n:root { "
    + " ".join(f"--arm-{number}: {colour};" for number, colour in enumerate(_LIGHT))
    + " }\n@media (prefers-color-scheme: dark) { :root { "
    + " ".join(f"--arm-{number}: {colour};" for number, colour in enumerate(_DARK))
    + " } }\n"
    + "\n".join(f".arm-{n} {{ stroke: var(--arm-{n}); --own: var(--arm-{n}) }}" for n in range(COLOURS))
    + """
.mean { fill: none; stroke-width: 2.2; stroke-linejoin: round }
.seeds { stroke: none; fill: var(--own); fill-opacity: .16 }
.last { fill: var(--own); stroke: var(--card); stroke-width: 1.5 }
section { margin-top: 2.2rem }
main { max-width: 72rem }
table { font-size: .84rem }
th, td { padding: .4rem .55rem }
tr > :first-child { padding-left: 1rem }
td.t { min-width: 9rem }
h1 { font-size: 1.5rem; color: var(--ink); letter-spacing: -.01em; margin: 0 0 .3rem }
.key { margin: 1rem 0 0 }
.key line { stroke-width: 3 }
.troubles { color: var(--fail) }
"""
)


def comparison_page(comparison: ArmComparison) -> str:
    """The page as HTML. Every name comes from a configuration or a record, and is escaped."""
    title = f"{comparison.name}: arms compared"
    charts = [
        f"<section><h2>{escape(comparison.measure.capitalize())} against {escape(axis.title)}</h2>"
        f'<figure class="box">{wide}{chart(comparison, axis, _NARROW)}</figure></section>'
        for axis in AXES
        if (wide := chart(comparison, axis, _WIDE))
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{_lead(comparison)}{_table(comparison)}{_key(comparison)}"
        f"{''.join(charts) or '<p>No arm has been evaluated yet.</p>'}{_troubles(comparison)}"
        "</main></body></html>\n"
    )


def _lead(comparison: ArmComparison) -> str:
    direction = "lower" if comparison.measure == "perplexity" else "higher"
    said = (
        f"{comparison.measure.capitalize()} on the dev rows, {direction} is better; final is after the last round. "
        "Lines are means over seeds, bands reach from the least to the most. A forward pass is one example once "
        "through the model; backpropagation counts four. "
    )
    return f'<p class="lead">{escape(f"{said}{denominator_text(comparison)} {groups_text(comparison)}".strip())}</p>'


def _table(comparison: ArmComparison) -> str:
    names = columns(comparison)
    rows = [
        Row(
            tuple(escape(cell) for cell in cells(comparison, arm)),
            "chosen" if arm.name == comparison.reference else "",
        )
        for arm in comparison.arms
    ]
    numbers = [index for index, name in enumerate(names) if name not in WORDS]
    return table("Arms compared", names, rows, numbers=numbers)


def _key(comparison: ArmComparison) -> str:
    entries = []
    for index, arm in enumerate(comparison.arms):
        dashes = f' stroke-dasharray="{dash(index)}"' if dash(index) else ""
        line = f'<line class="arm-{index % COLOURS}" x1="0" x2="26" y1="7" y2="7"{dashes}/>'
        entries.append(f'<li><svg aria-hidden="true">{line}</svg>{escape(arm.name)}</li>')
    return f'<ul class="key">{"".join(entries)}</ul>'


def _troubles(comparison: ArmComparison) -> str:
    """Why arms did not finish."""
    said = [
        f"<li>{escape(f'{record.arm}, seed {record.seed}: {record.status}')}"
        + (escape(f" at round {record.round}") if record.status == "diverged" else "")
        + f"{escape(f': {record.reason}')}</li>"
        for record in comparison.records
        if record.status != "finished"
    ]
    if not said:
        return ""
    return f'<section class="troubles"><h2>Did not finish</h2><ul>{"".join(said)}</ul></section>'
