"""Robustness over groups of rows: those whose devices took part in a run, and those of nobody who did.

"Less is Fed More" (CustomNLP4U 2024) measures it by a Continuous Relative Robustness Metric, whose formula was not at
hand. What is computed here is a stand-in of our own, and is called so (``crrm_standin``). With S(p) the score of p::

    r(p) = (S(p) after - S(p) before) / max(S(p) before, EPSILON)
    crrm_standin = (mean of r over groups that took part + mean of r over groups that did not) / 2

It is 0 where nothing changed, and continuous: no group counts as won or lost. A group is rows of one kind, such as a
language: in a simulation the dev rows of an owner, in a daemon's run those that ``evaluation.groups`` names. It took
part if a device of its own had a result counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from msgspec import Struct

#: What everybody is told beside the figure.
WARNING = (
    "crrm stand-in is the mean of both and stands in for a published metric whose formula was not at hand."
)
#: Least score that a change is divided by.
EPSILON = 1e-3


class GroupScore(Struct, frozen=True):
    """One group.

    Attributes:
        group: name of the group.
        took_part: whether a device of the group had a result counted.
        rows: number of its dev rows.
        before: accuracy on them with the values that the run started from.
        after: accuracy on them with the values that it ended with.
    """

    group: str
    took_part: bool
    rows: int
    before: float
    after: float

    @property
    def relative(self) -> float:
        """Change of the score, relative to what it was."""
        return (self.after - self.before) / max(self.before, EPSILON)


class Robustness(Struct, frozen=True):
    """All groups of a run.

    Attributes:
        seen: mean relative change over groups that took part; None if there is none.
        unseen: the same over groups that did not.
        crrm_standin: mean of both, a stand-in for the published metric; None if one is missing.
        groups: the groups, by name.
    """

    seen: float | None
    unseen: float | None
    crrm_standin: float | None
    groups: tuple[GroupScore, ...]


def robustness_of(groups: Sequence[GroupScore]) -> Robustness:
    """The means over groups."""
    seen = [group.relative for group in groups if group.took_part]
    unseen = [group.relative for group in groups if not group.took_part]
    of_seen = fmean(seen) if seen else None
    of_unseen = fmean(unseen) if unseen else None
    both = None if of_seen is None or of_unseen is None else (of_seen + of_unseen) / 2
    return Robustness(of_seen, of_unseen, both, tuple(sorted(groups, key=lambda group: group.group)))
