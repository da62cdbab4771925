"""Curves of the arms as SVG: mean over seeds as a line, smallest to largest as a band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from coordinator.simulation.record import Point, Record
from coordinator.simulation.report.comparison import ArmComparison, score
from coordinator.simulation.report.table import count_text
from edge_runtime.html.line_chart import Plane, axes
from edge_runtime.html.svg import points_text, svg

#: Colours of the page's style sheet, taken in turn; with dashes, more arms than colours can be told apart.
COLOURS = 8
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_HEIGHT = 320


@dataclass(frozen=True)
class Axis:
    """What a curve is drawn over.

    Attributes:
        key: word for the drawing's id.
        title: text beside the axis.
        of: function that tells where on the axis a point of a record lies.
        label: function that writes a number of the axis.
    """

    key: str
    title: str
    of: Callable[[Point], float]
    label: Callable[[float], str]


AXES = (
    Axis("rounds", "rounds", lambda point: point.round + 1, lambda value: f"{value:.0f}"),
    Axis("passes", "forward passes of one example", lambda point: point.forward_passes, count_text),
    Axis("bytes", "MiB up", lambda point: point.bytes_up / (1 << 20), lambda value: f"{value:.3g}"),
)


@dataclass(frozen=True)
class Curve:
    """One arm over one axis.

    Attributes:
        name: name of the arm.
        points: x, mean, least and most score of each round that all seeds evaluated.
    """

    name: str
    points: tuple[tuple[float, float, float, float], ...]


def curves(comparison: ArmComparison, axis: Axis) -> list[Curve]:
    """A curve for each arm, empty where nothing was measured."""
    return [
        Curve(arm.name, _points([r for r in comparison.records if r.arm == arm.name], axis))
        for arm in comparison.arms
    ]


def chart(comparison: ArmComparison, axis: Axis, width: int) -> str:
    """The drawing of all arms over one axis; empty if there is no curve."""
    drawn = curves(comparison, axis)
    every = [point for curve in drawn for point in curve.points]
    if not every:
        return ""
    plane = Plane.around(
        width,
        _HEIGHT,
        most=max(point[0] for point in every),
        low=min(point[2] for point in every),
        high=max(point[3] for point in every),
        percent=comparison.measure == "accuracy",
    )
    parts = axes(plane, axis.title, axis.label)
    for index, curve in enumerate(drawn):
        parts += _band(plane, curve, index)
    for index, curve in enumerate(drawn):
        parts += _line(plane, curve, index)
    described = "; ".join(
        f"{curve.name}: {plane.label(curve.points[-1][1])} at {axis.label(curve.points[-1][0])}"
        for curve in drawn
        if curve.points
    )
    title = f"{comparison.measure.capitalize()} against {axis.title}"
    return svg(f"curve-{axis.key}", width, _HEIGHT, title, described, parts)


def dash(index: int) -> str:
    """The dashes by which an arm differs from another of the same colour."""
    return _DASHES[index // COLOURS % len(_DASHES)]


def _band(plane: Plane, curve: Curve, index: int) -> list[str]:
    if len(curve.points) < 2 or all(low == high for _, _, low, high in curve.points):
        return []
    upper = [(plane.x(x), plane.y(high)) for x, _, _, high in curve.points]
    lower = [(plane.x(x), plane.y(low)) for x, _, low, _ in reversed(curve.points)]
    return [f'<polygon class="seeds arm-{index % COLOURS}" points="{points_text([*upper, *lower])}"/>']


def _line(plane: Plane, curve: Curve, index: int) -> list[str]:
    if not curve.points:
        return []
    dashes = f' stroke-dasharray="{dash(index)}"' if dash(index) else ""
    places = [(plane.x(x), plane.y(mean)) for x, mean, _, _ in curve.points]
    end_x, end_y = places[-1]
    colour = f"arm-{index % COLOURS}"
    return [
        f'<polyline class="mean {colour}"{dashes} points="{points_text(places)}"/>',
        f'<circle class="last {colour}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3.5"/>',
    ]


def _points(records: Sequence[Record], axis: Axis) -> tuple[tuple[float, float, float, float], ...]:
    by_round: dict[int, list[tuple[float, float]]] = {}
    for record in records:
        for index, point in enumerate(record.points):
            value = score(record, index)
            if value is not None:
                by_round.setdefault(point.round, []).append((axis.of(point), value))
    measured = max((len(found) for found in by_round.values()), default=0)
    points = []
    for number in sorted(by_round):
        found = by_round[number]
        if len(found) == measured:  # elsewhere the mean would jump where a seed ends
            values = [value for _, value in found]
            points.append((fmean(x for x, _ in found), fmean(values), min(values), max(values)))
    return tuple(points)
