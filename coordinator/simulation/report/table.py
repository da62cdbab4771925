"""The comparison as rows of texts, and as an aligned plain-text table."""

from __future__ import annotations

from coordinator.rounds.robustness import WARNING
from coordinator.simulation.report.comparison import ArmComparison, ArmFigures
from edge_runtime.figures import size

#: Columns that hold words; all others hold figures.
WORDS = frozenset({"arm", "kind", "status"})


def columns(comparison: ArmComparison) -> tuple[str, ...]:
    """Names of the columns; gains only where there is a head-only arm to measure them from."""
    gain: tuple[str, ...] = ("gain", "kept") if comparison.denominator is not None else ()
    if comparison.denominator is None and any(arm.gain is not None for arm in comparison.arms):
        gain = ("gain",)
    final = f"final {comparison.measure}"
    groups = ("seen", "unseen", "crrm stand-in") if has_groups(comparison) else ()
    costs = ("passes", "to best", "up a task")
    return ("arm", "kind", "seeds", final, "range", "best", *gain, *groups, *costs, "status")


def has_groups(comparison: ArmComparison) -> bool:
    """Whether an arm was scored over groups of rows."""
    return any(arm.seen is not None or arm.unseen is not None for arm in comparison.arms)


def groups_text(comparison: ArmComparison) -> str:
    """What the columns of groups are, in one sentence; empty if there are none."""
    if not has_groups(comparison):
        return ""
    return (
        "Seen and unseen: mean relative change of accuracy over owners of dev rows that took part, and that did not; "
        f"{WARNING}"
    )


def cells(comparison: ArmComparison, arm: ArmFigures) -> tuple[str, ...]:
    """One arm as texts, in the order of :func:`columns`; empty where nothing was measured."""
    spread = "" if arm.low is None else f"{_score(comparison, arm.low)} – {_score(comparison, arm.high)}"
    texts = {
        "arm": arm.name,
        "kind": arm.kind or "",
        "seeds": str(len(arm.seeds)),
        f"final {comparison.measure}": _score(comparison, arm.final),
        "range": spread,
        "best": _score(comparison, arm.best),
        "gain": "" if arm.gain is None else gain_text(comparison, arm.gain),
        "kept": "" if arm.kept is None else f"{100 * arm.kept:.0f} %",
        "seen": _relative(arm.seen),
        "unseen": _relative(arm.unseen),
        "crrm stand-in": _relative(arm.crrm_standin),
        "passes": count_text(arm.passes),
        "to best": count_text(arm.passes_to_best),
        "up a task": "" if arm.bytes_up_per_task is None else size(arm.bytes_up_per_task),
        "status": arm.status,
    }
    return tuple(texts[name] for name in columns(comparison))


def denominator_text(comparison: ArmComparison) -> str:
    """What ``kept`` is a share of, in one sentence; empty if there is nothing to say."""
    if comparison.head_only is None:
        return ""
    if comparison.denominator is None:
        return f"Gains are over {comparison.head_only}."
    gain = gain_text(comparison, comparison.denominator)
    said = f"Gains are over {comparison.head_only}; the denominator is the gain of {comparison.reference}: {gain}."
    if comparison.denominator <= 0:
        said += " It gained nothing, so there is no share to keep."
    return said


def text_table(comparison: ArmComparison) -> str:
    """All arms, aligned, with a line on what gains are measured from."""
    names = columns(comparison)
    rows = [names, *(cells(comparison, arm) for arm in comparison.arms)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    lines = [
        "  ".join(
            cell.ljust(width) if name in WORDS else cell.rjust(width)
            for name, cell, width in zip(names, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    said = [text for text in (denominator_text(comparison), groups_text(comparison)) if text]
    return "\n".join([*lines, *(["", *said] if said else [])]) + "\n"


def _relative(change: float | None) -> str:
    return "" if change is None else f"{100 * change:+.1f} %"


def gain_text(comparison: ArmComparison, gain: float) -> str:
    """A difference of scores: points of accuracy, or of perplexity."""
    return f"{gain:+.3f}" if comparison.measure == "perplexity" else f"{100 * gain:+.1f} pt"


def count_text(count: float | None) -> str:
    """A large number in few digits."""
    if count is None:
        return ""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f}"


def _score(comparison: ArmComparison, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if comparison.measure == "perplexity" else f"{100 * value:.1f} %"
