"""What an operator sees while arms are simulated: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from coordinator.simulation.arm import Arm, label
from coordinator.simulation.record import Record
from coordinator.simulation.sweep import Progress
from coordinator.storage import evaluation_rows, run_rows


class Standing:
    """How far an arm is, from its database; each evaluated round is news once.

    Args:
        arm: arm that is simulated.
    """

    def __init__(self, arm: Arm) -> None:
        self._arm = arm
        self._told: int | None = None
        self.committed, self.score, self.news = 0, "", False
        self.look()

    def look(self) -> None:
        """Read the database again; ``news`` is whether a round was evaluated since the last look."""
        with self._arm.stores.storage.reading() as connection:
            self.committed = run_rows.get(connection, self._arm.run_id).rounds_done
            last = evaluation_rows.find_last_done(connection, self._arm.run_id)
        self.news = last is not None and last.round != self._told
        if last is not None:
            self._told = last.round
            self.score = f"accuracy {100 * last.accuracy:.1f} %, loss {last.mean_loss:.4f}"


class Lines:
    """One line for each evaluated round.

    Args:
        out: stream that lines are written to.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._standing: Standing | None = None

    def skip(self, record: Record) -> None:
        """See :class:`coordinator.simulation.sweep.Progress`."""
        self._write(f"{record.arm}-seed{record.seed}: {record.status} before")

    def begin(self, arm: Arm) -> None:
        """See :class:`coordinator.simulation.sweep.Progress`."""
        self._standing = Standing(arm)
        if self._standing.committed:
            self._write(f"{label(arm.config, arm.seed)}: goes on after {self._standing.committed} rounds")

    def report(self, arm: Arm) -> None:
        """See :class:`coordinator.simulation.sweep.Progress`."""
        if self._standing is None:
            return
        self._standing.look()
        if self._standing.news:
            done = f"{self._standing.committed}/{arm.expected_rounds} rounds"
            self._write(f"{label(arm.config, arm.seed)}: {done}, {self._standing.score}, {arm.wall_s:.1f} s")

    def end(self, record: Record) -> None:
        """See :class:`coordinator.simulation.sweep.Progress`."""
        self._write(
            f"{record.arm}-seed{record.seed}: {record.status}{record.reason and f' ({record.reason})'}"
        )

    def _write(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


class LiveBar:
    """A bar over all arms and seeds, and one over the rounds of the present arm.

    Args:
        bar: bar of the terminal.
        arms: number of arms, each seed counted.
    """

    def __init__(self, bar: Bar, arms: int) -> None:
        self._bar, self._arms = bar, arms
        self._all = bar.add_task("arms", total=arms, score="")
        self._present: TaskID | None = None
        self._standing: Standing | None = None

    def skip(self, record: Record) -> None:
        """See :class:`coordinator.simulation.sweep.Progress`."""
        del record
        self._bar.advance(self._all)

    def begin(self, arm: Arm) -> None:
        """See :class:`coordinator.simulation.sweep.Progress`."""
        self._standing = Standing(arm)
        name = label(arm.config, arm.seed)
        self._present = self._bar.add_task(
            name, total=arm.expected_rounds, completed=self._standing.committed, score=self._standing.score
        )

    def report(self, arm: Arm) -> None:
        """See :class:`coordinator.simulation.sweep.Progress`."""
        del arm
        if self._standing is not None and self._present is not None:
            self._standing.look()
            self._bar.update(self._present, completed=self._standing.committed, score=self._standing.score)

    def end(self, record: Record) -> None:
        """See :class:`coordinator.simulation.sweep.Progress`."""
        if self._present is not None:
            self._bar.remove_task(self._present)
        self._bar.console.print(
            f"{record.arm}-seed{record.seed}: {record.status}{record.reason and f' ({record.reason})'}",
            markup=False,
            highlight=False,
        )
        self._bar.advance(self._all)


@contextmanager
def progress_for(arms: int, out: TextIO) -> Iterator[Progress]:
    """A bar if ``out`` is a terminal, else lines."""
    if not out.isatty():
        yield Lines(out)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[score]}"),
    )
    with Bar(*columns, console=Console(file=out)) as bar:
        yield LiveBar(bar, arms)
