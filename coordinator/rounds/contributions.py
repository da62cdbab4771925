"""What the counted results of a round contribute: read, compared with each other, left out where they are absurd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.robust import Sizes, bounded, lower_median, score, sizes, yardsticks
from coordinator.aggregation.staleness import discounted
from coordinator.events import record
from coordinator.rounds.deltas import read_delta, read_line
from coordinator.rounds.private_rounds import adds_noise
from coordinator.rounds.runs import Run
from coordinator.rounds.set_aside import note_left_out
from coordinator.rounds.stated_variance import variance_factors
from coordinator.storage import result_rows
from coordinator.storage.connection import Connection
from coordinator.storage.result_rows import CountedResult
from coordinator.storage.stores import Stores
from edge_runtime.errors import SliceError
from edge_runtime.package.ranks import with_rank
from edge_runtime.package.slices import Values, decode_values
from edge_runtime.protocol.messages import Task

#: Deltas up to this size in all are kept from comparing them to summing them up; others are read twice, which costs a
#: round of a thousand results next to nothing.
KEPT_BYTES = 8 << 20


@dataclass(frozen=True)
class LeftOut:
    """A result that does not enter its round's mean.

    Attributes:
        result: the result.
        reason: why not.
        suspect: whether it says something of the device: enough others were there to compare it with.
    """

    result: CountedResult
    reason: str
    suspect: bool


class Contributions:
    """A round's results, compared with each other.

    Attributes:
        admitted: results that enter the mean, in the order of their slots.
        left_out: results that do not.
        scores: how many times each result exceeds the round's median, by task; infinite ones are no number in it.
        yardsticks: what they were compared with.
    """

    def __init__(self, stores: Stores, run: Run, values: Values, results: list[CountedResult]) -> None:
        """Read all results once.

        Args:
            stores: handles on the state folder.
            run: the run.
            values: current slice values, which the round's tasks came with unless the run is buffered.
            results: counted results of the round, in the order of their slots.
        """
        self._stores, self._run, self._values = stores, run, values
        self._sizes: dict[str, dict[str, float]] = {}
        self._kept: dict[str, Contribution] = {}
        self.left_out: list[LeftOut] = []
        # Whether one is left out must not hang on what others sent, where noise is to hide each of them.
        noised = adds_noise(run.config)
        kept_bytes = 0
        for result in results:
            try:
                contribution = self._read(result)
            except SliceError as error:  # of a replay alone: all else was checked when it arrived
                self.left_out.append(LeftOut(result, str(error), suspect=True))
                continue
            self._sizes[result.task_id] = {} if noised else sizes(contribution, result.steps_applied)
            kept_bytes += sum(array.nbytes for array in contribution.delta.values())
            if kept_bytes <= KEPT_BYTES:
                self._kept[result.task_id] = contribution
        read = [result for result in results if result.task_id in self._sizes]
        weighing = [self._sizes[result.task_id] for result in read if result.examples]
        self.yardsticks = yardsticks(weighing, run.delta_sizes)
        self.scores = {name: score(found, self.yardsticks) for name, found in self._sizes.items()}
        limit = run.config.norm_limit
        self.admitted = [result for result in read if self.scores[result.task_id] <= limit]
        for result in read:
            if self.scores[result.task_id] > limit:
                suspect = self._sizes[result.task_id].keys() <= self.yardsticks.medians.keys()
                self.left_out.append(LeftOut(result, self._too_large(result), suspect=suspect))

    def __iter__(self) -> Iterator[Contribution]:
        """What enters the mean, one at a time in the order of the slots."""
        pairs = (
            (
                discounted(self._kept.get(result.task_id) or self._read(result), self._staleness(result)),
                self._sizes[result.task_id],
            )
            for result in self.admitted
        )
        return bounded(pairs, self.yardsticks.medians, self._run.config)

    @property
    def sizes(self) -> Sizes:
        """The size of each slice as it was last seen, in this round or before: a hint for rounds with few devices."""
        last = dict(self._run.delta_sizes)
        admitted = [self._sizes[result.task_id] for result in self.admitted]
        for of in {of for found in admitted for of in found}:
            middle = lower_median(found[of] for found in admitted if of in found)
            if middle is not None:
                last[of] = middle
        return last

    def note(self, connection: Connection, number: int, *, now_s: float) -> None:
        """Store the scores and tell who was left out, in the transaction that closes the round.

        Args:
            connection: connection with a transaction under way.
            number: number of the round.
            now_s: the present moment.
        """
        for task_id, found in self.scores.items():
            result_rows.note_score(connection, task_id, found if math.isfinite(found) else None)
        for each in self.left_out:
            result = each.result
            result_rows.note_left_out(connection, result.task_id, each.reason)
            record(
                connection,
                now_s,
                "result_left_out",
                each.reason,
                run_id=self._run.run_id,
                round_number=number,
                device=result.device_name,
                task_id=result.task_id,
            )
            if each.suspect:
                note_left_out(
                    connection,
                    self._run.run_id,
                    result.device_id,
                    result.device_name,
                    each.reason,
                    most=self._run.config.max_left_out,
                    now_s=now_s,
                )

    def words(self) -> str:
        """Who was left out, for a round that cannot do without them."""
        return "; ".join(f"{each.result.device_name}: {each.reason}" for each in self.left_out)

    def _too_large(self, result: CountedResult) -> str:
        found = self.scores[result.task_id]
        if not math.isfinite(found):
            return "its change is not finite, or beyond any that training makes"
        limit = self._run.config.norm_limit
        return f"its change is {found:.3g} times what it is compared with, over norm_limit = {limit:g}"

    def _read(self, result: CountedResult) -> Contribution:
        task = msgspec.json.decode(result.task, type=Task)
        data = self._stores.private_blobs.get(result.change_sha256)
        values = self._values
        if task.report == "scalars" and self._run.is_buffered:  # the task's values may be of an earlier round
            held = with_rank(self._run.manifest, task.rank)
            values = decode_values(self._stores.blobs.get(task.state), held.slices)
        delta = read_delta(self._run.manifest, task, values, data, self._reference(task))
        return Contribution(
            result.examples,
            delta,
            steps=result.steps_applied if self._run.config.normalise_steps else 1,
            slot=result.slot,
            line=read_line(task, data),
            variance=variance_factors(task, self._run.manifest.slices, result.estimator, result.draws),
        )

    def _staleness(self, result: CountedResult) -> int:
        """Steps that were made since a device got its values; 0 in a run whose rounds wait."""
        return self._run.committed - result.committed_before if self._run.is_buffered else 0

    def _reference(self, task: Task) -> Values | None:
        """What a replay needs beside the values; a delta that travelled as it is needs nothing."""
        if task.report != "scalars" or task.reference is None:
            return None
        return decode_values(self._stores.blobs.get(task.reference), self._run.manifest.slices)
