"""A server rate that sets itself: the best length of the last step, measured a round later by those who are there.

A round moves the slices by η·u, where u is the server optimiser's direction. The devices of the next round find, at
the new values, the derivative s of the loss along u and its curvature c, from one draw along u
(:mod:`edge_runtime.training.line`). Were the loss a parabola along u, the best length of that step would have been
η - s/c. One round's answer is mostly noise: the next devices hold other rows, and in a third of the rounds the slope
points the other way. So both parts of the ratio are averaged over rounds before they are divided,

    P = k P + (1 - k) (c η - s),        C = k C + (1 - k) c,        wanted rate = P / C,

which is the least-squares fit of one length to the parabolas of all rounds, each weighed by its curvature; and the rate
goes towards it by at most a factor in a round. A round in which nothing moved, or along which the loss is flat, says
nothing, and the rate stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

#: Rate of the first steps. Within four rounds it can be five times as large, or as small.
START = 0.05
#: Share of the averages that a round keeps, and the largest factor between the rates of two rounds.
KEPT, MOST = 0.8, 1.5
#: Rates beyond these are none that training could want.
LEAST_RATE, MOST_RATE = 1e-6, 1e3


@dataclass(frozen=True)
class OwnRate:
    """What is known of the rate.

    Attributes:
        rate: rate for the next step, before it is lowered by the course of rates over a run.
        moved: length η of the last step in units of its direction: the rate that it took; 0 before the first.
        pull: average P of c·η - s.
        bend: average C of the curvature c.
    """

    rate: float = START
    moved: float = 0.0
    pull: float = 0.0
    bend: float = 0.0

    def measured(self, slope: float, curvature: float) -> OwnRate:
        """What is known after a round's devices measured along the last step, by which the values moved.

        Args:
            slope: mean derivative of the loss along that step, for the whole of its length: η·s.
            curvature: its mean second derivative, likewise: η²·c.
        """
        if self.moved <= 0 or curvature <= 0:
            return self
        s, c = slope / self.moved, curvature / self.moved**2
        pull, bend = KEPT * self.pull + (1 - KEPT) * (c * self.moved - s), KEPT * self.bend + (1 - KEPT) * c
        bounded = min(max(pull / bend, self.rate / MOST), self.rate * MOST)
        return replace(self, rate=min(max(bounded, LEAST_RATE), MOST_RATE), pull=pull, bend=bend)

    def stepped(self, share: float) -> OwnRate:
        """What is known after a step at this rate, of which the course over the run takes a share."""
        return replace(self, moved=self.rate * share)


def measured(own: OwnRate, lines: Sequence[tuple[int, tuple[float, float]]]) -> tuple[OwnRate, bool]:
    """What is known after a round, and whether its devices found the loss flat along a step that did move something.

    Args:
        own: what was known before.
        lines: examples, slope and curvature of each device that measured.
    """
    examples = sum(count for count, _ in lines)
    if not examples:
        return own, False
    slope, curvature = (sum(count * line[i] for count, line in lines) / examples for i in (0, 1))
    return own.measured(slope, curvature), curvature <= 0
