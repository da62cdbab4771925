"""Sizes, times and shares as people read them: the same in every text, page and error of the project.

Sizes are in binary units, as operators type them (``cap = "256M"``) and as the kernel enforces them
(docs/decisions/0010-enforcement.md): 1 KiB is 2^10 bytes, 1 MiB is 2^20, 1 GiB is 2^30.
"""

from __future__ import annotations

MIB = 1 << 20
GIB = 1 << 30
#: Stands where a figure would, if there is none.
NOT_MEASURED = "not measured"


def size(count: float) -> str:
    """A size in bytes as text, in the largest unit that leaves a digit before the point."""
    least = abs(count)
    if least < 1 << 10:
        return "1 byte" if count == 1 else f"{count:.0f} bytes"
    if least < MIB:
        return f"{count / (1 << 10):.1f} KiB"
    if least < 10 * MIB:
        return f"{count / MIB:.2f} MiB"
    return f"{count / MIB:.1f} MiB" if least < GIB else f"{count / GIB:.2f} GiB"


def whole_size(count: int, *, up: bool = False) -> str:
    """A size in bytes for an error or an advice: whole MiB, as a cap is typed; below that, as :func:`size` writes it.

    Args:
        count: the size in bytes.
        up: whether to round up, for a size that has to be granted.
    """
    if up:
        count = -(-count // MIB) * MIB
    return f"{count // MIB} MiB" if count >= MIB else size(count)


def column_mib(count: float | None) -> str:
    """A size in bytes as a bare number of MiB for a table, or words that say there is none."""
    if count is None:
        return NOT_MEASURED
    mib = count / MIB
    return f"{mib:.2f}" if count == 0 or abs(mib) >= 0.005 else "< 0.01" if mib > 0 else "> -0.01"


def duration(seconds: float | None) -> str:
    """A time in seconds as text, "3 min 14 s" from a minute on, or words that say there is none."""
    if seconds is None:
        return NOT_MEASURED
    if 0 < seconds < 0.0009995:
        return f"{seconds * 1e6:.0f} µs"
    if 0 < seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def share(part: float, *, signed: bool = False) -> str:
    """A share in per cent, with one digit after the point where it is small."""
    percent = 100 * part
    digits = 0 if abs(percent) >= 9.95 or part == 0 else 1
    signed = signed and part != 0
    return f"{percent:+.{digits}f} %" if signed else f"{percent:.{digits}f} %"


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
