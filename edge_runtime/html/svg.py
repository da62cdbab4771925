"""SVG: elements, text, and the ticks of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

#: Drawings below this width in pixels are for phones; the style shows one of the two.
NARROW = 600

SHORTEST = 1e-9  # seconds or MiB an axis is long at least


def ticks(most: float, count: int) -> list[float]:
    """Round numbers from 0 to ``most``, about ``count`` of them, in steps of 1, 2 or 5 times a power of ten."""
    raw = most / max(1, count)
    if raw < SHORTEST:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return [step * index for index in range(int(most / step) + 1)]


def points_text(points: Sequence[tuple[float, float]]) -> str:
    """Points as the value of a ``points`` attribute."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def svg_text(x: float, y: float, text: str, kind: str = "") -> str:
    """An escaped text at (x, y); ``kind`` is its class."""
    return f'<text class="{kind.strip()}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def svg(name: str, width: int, height: float, title: str, described: str, parts: Sequence[str]) -> str:
    """A whole drawing.

    Args:
        name: word that makes the drawing's element ids unique in a page.
        width: width in pixels.
        height: height in pixels.
        title: title, which screen readers say.
        described: description, which screen readers say next.
        parts: the elements.
    """
    key = f"{name}-{width}"
    return (
        f'<svg class="{"narrow" if width < NARROW else "wide"}" viewBox="0 0 {width} {height:.0f}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(described)}</desc>'
        f"{''.join(parts)}</svg>"
    )
