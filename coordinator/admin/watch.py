"""``run watch``: a live table of rounds on a terminal, one line a round elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.table import Table

from coordinator.admin.client import AdminClient
from coordinator.admin.report import columns, headline, line, row
from coordinator.rounds.summary import RunSummary

#: Seconds between two looks.
PERIOD_S = 0.5
ENDED = frozenset({"finished", "failed", "stopped"})


def watch(client: AdminClient, run_id: str, *, sleep: Callable[[float], None] = time.sleep) -> RunSummary:
    """Show a run until it has ended, and return it as it ended."""
    run_id = client.run(run_id).run_id
    if sys.stdout.isatty():
        return _watch_live(client, run_id, sleep)
    return _watch_lines(client, run_id, sleep)


def table(run: RunSummary, rows: int) -> Table:
    """The newest ``rows`` rounds of a run."""
    drawn = Table(title=headline(run), title_justify="left")
    for column in columns(run):
        drawn.add_column(column, justify="right")
    for entry in run.rounds[-rows:]:
        drawn.add_row(*row(run, entry))
    return drawn


def _watch_live(client: AdminClient, run_id: str, sleep: Callable[[float], None]) -> RunSummary:
    console = Console()
    rows = max(console.height - 6, 3)
    run = client.run(run_id)
    with Live(table(run, rows), console=console, auto_refresh=False) as live:
        while run.state not in ENDED:
            sleep(PERIOD_S)
            run = client.run(run_id)
            live.update(table(run, rows), refresh=True)
    return run


def _watch_lines(client: AdminClient, run_id: str, sleep: Callable[[float], None]) -> RunSummary:
    write = sys.stdout.write
    run = client.run(run_id)
    write(line(run, columns(run)) + "\n")
    shown = 0
    while True:
        ended = run.state in ENDED
        # A round is shown once it is complete: closed, and evaluated if it will be.
        while shown < len(run.rounds):
            entry = run.rounds[shown]
            if not ended and (entry.state not in ("committed", "abandoned") or awaits_evaluation(run, shown)):
                break
            write(line(run, row(run, entry)) + "\n")
            shown += 1
        sys.stdout.flush()
        if ended:
            write(headline(run) + "\n")
            return run
        sleep(PERIOD_S)
        run = client.run(run_id)


def awaits_evaluation(run: RunSummary, index: int) -> bool:
    """Whether a committed round is one that will be evaluated and is not yet."""
    entry = run.rounds[index]
    unevaluated = entry.state == "committed" and entry.accuracy is None and not entry.rolled_back
    if run.config.evaluation is None or not unevaluated:
        return False
    committed = sum(
        earlier.state == "committed" and not earlier.rolled_back for earlier in run.rounds[: index + 1]
    )
    return committed % run.config.evaluation.every_rounds == 0 or committed == run.rounds_wanted
