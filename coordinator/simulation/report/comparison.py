"""What the arms came to, with their seeds put together: the figures of the table and of the page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from msgspec import Struct
from msgspec.structs import replace

from coordinator.simulation.config import SimulationConfig
from coordinator.simulation.record import Record
from edge_runtime.package.manifest import TaskKind

#: Status of an arm whose seeds all finished.
FINISHED = "finished"


class ArmFigures(Struct, frozen=True):
    """One arm over its seeds; None where nothing was measured.

    Scores are accuracy, or perplexity for language modelling, where lower is better.

    Attributes:
        name: name of the arm.
        kind: a few words for people.
        seeds: seeds that have a record.
        final: mean over seeds of the last score.
        low: smallest last score of a seed.
        high: largest last score of a seed.
        best: mean over seeds of the best score.
        gain: distance from the head-only arm's final score to this one's, positive if this one is better; None unless
            both finished.
        kept: share of the reference arm's gain that this gain is.
        passes: forward passes in all, mean over seeds.
        passes_to_best: forward passes until the best score, mean over seeds.
        bytes_up_per_task: bytes up, mean over all tasks that were handed out.
        status: sentence on the seeds that did not finish; "finished" if all did.
        seen: mean relative change of the score over groups that took part, mean over seeds.
        unseen: the same over groups that did not.
        crrm_standin: mean of both (:mod:`coordinator.rounds.robustness`).
    """

    name: str
    kind: str
    seeds: tuple[int, ...]
    final: float | None = None
    low: float | None = None
    high: float | None = None
    best: float | None = None
    gain: float | None = None
    kept: float | None = None
    passes: float | None = None
    passes_to_best: float | None = None
    bytes_up_per_task: float | None = None
    status: str = ""
    seen: float | None = None
    unseen: float | None = None
    crrm_standin: float | None = None


class ArmComparison(Struct, frozen=True):
    """All arms of a simulation, compared.

    Attributes:
        name: name of the simulation.
        task: task of the packages.
        arms: figures of each arm, in the order of the configuration.
        records: records that the figures are made of.
        head_only: name of the arm that gains are measured from, if there is one.
        reference: name of the arm whose gain ``kept`` is a share of, if there is one.
        denominator: gain of the reference arm; None if it has none.
    """

    name: str
    task: TaskKind
    arms: tuple[ArmFigures, ...]
    records: tuple[Record, ...]
    head_only: str | None = None
    reference: str | None = None
    denominator: float | None = None

    @property
    def measure(self) -> str:
        """Name of what scores are."""
        return "perplexity" if self.task == "causal_lm" else "accuracy"


def compare(config: SimulationConfig, records: Sequence[Record]) -> ArmComparison:
    """Put records together; arms that the configuration does not name are left out."""
    wanted = config.comparison
    named = {arm.name: arm.kind for arm in config.arms}
    known = tuple(record for record in records if record.arm in named)
    measured = [record for record in known if record.points]
    task: TaskKind = measured[0].task if measured else "classification"
    figures = {
        name: _figures(name, kind, [record for record in known if record.arm == name])
        for name, kind in named.items()
        if any(record.arm == name for record in known)
    }
    floor = figures.get(wanted.head_only or "")
    top = figures.get(wanted.reference or "")
    denominator = _gain(top, floor, task)
    arms = []
    for arm in figures.values():
        gain = _gain(arm, floor, task)
        kept = (
            gain / denominator if gain is not None and denominator is not None and denominator > 0 else None
        )
        arms.append(replace(arm, gain=gain, kept=kept))
    return ArmComparison(
        config.name, task, tuple(arms), known, wanted.head_only, wanted.reference, denominator
    )


def score(record: Record, index: int) -> float | None:
    """The score at a point of a record."""
    point = record.points[index]
    return point.perplexity if record.task == "causal_lm" else point.accuracy


def scores(record: Record) -> list[float]:
    """All scores of a record, in the order of its rounds."""
    found = [score(record, index) for index in range(len(record.points))]
    return [value for value in found if value is not None]


def _figures(name: str, kind: str, records: Sequence[Record]) -> ArmFigures:
    seeds = tuple(record.seed for record in records)
    status = _status(records)
    measured = [record for record in records if scores(record)]
    if not measured:
        return ArmFigures(name, kind, seeds, status=status)
    final = [scores(record)[-1] for record in measured]
    best = [_best(record) for record in measured]
    handed_out = sum(record.tasks for record in measured)
    return ArmFigures(
        name=name,
        kind=kind,
        seeds=seeds,
        final=fmean(final),
        low=min(final),
        high=max(final),
        best=fmean(value for value, _ in best),
        passes=fmean(record.points[-1].forward_passes for record in measured),
        passes_to_best=fmean(passes for _, passes in best),
        bytes_up_per_task=sum(record.points[-1].bytes_up for record in measured) / handed_out
        if handed_out
        else None,
        status=status,
        seen=_mean_of(records, "seen"),
        unseen=_mean_of(records, "unseen"),
        crrm_standin=_mean_of(records, "crrm_standin"),
    )


def _mean_of(records: Sequence[Record], name: str) -> float | None:
    """A figure of robustness, mean over the seeds that have it."""
    found = [getattr(record.robustness, name) for record in records if record.robustness is not None]
    numbers = [number for number in found if number is not None]
    return fmean(numbers) if numbers else None


def _status(records: Sequence[Record]) -> str:
    """How the seeds ended, those that did not finish by name: "seeds 0, 2 diverged at rounds 5, 7"."""
    said = []
    for status in ("diverged", "failed"):
        ended = [record for record in records if record.status == status]
        if ended:
            plural = "s" * (len(ended) > 1)
            where = f" at round{plural} {', '.join(str(record.round) for record in ended)}"
            seeds = ", ".join(str(record.seed) for record in ended)
            said.append(f"seed{plural} {seeds} {status}{where if status == 'diverged' else ''}")
    return "; ".join(said) or FINISHED


def _best(record: Record) -> tuple[float, int]:
    """The best score of a record, and the forward passes until it was first reached."""
    sign = -1.0 if record.task == "causal_lm" else 1.0
    found = []
    for index, point in enumerate(record.points):
        value = score(record, index)
        if value is not None:
            found.append((value, point.forward_passes))
    return max(found, key=lambda pair: (sign * pair[0], -pair[1]))


def _gain(arm: ArmFigures | None, floor: ArmFigures | None, task: TaskKind) -> float | None:
    if arm is None or floor is None or arm.final is None or floor.final is None:
        return None
    if (arm.status, floor.status) != (FINISHED, FINISHED):
        return None  # half a training has no gain to speak of
    return floor.final - arm.final if task == "causal_lm" else arm.final - floor.final
