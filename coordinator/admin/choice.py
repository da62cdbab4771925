"""Which run a command means: the one that was named, or else the only one that could be meant, or the newest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.rounds.summary import RunSummary
from edge_runtime.errors import ConfigError

#: What stands for the newest run.
LATEST = "latest"
OPEN = ("running", "evaluating", "queued")


@dataclass(frozen=True)
class Choice:
    """The run that a command means.

    Attributes:
        run_id: id of the run, for the coordinator to find.
        remark: what to tell of the choice where the operator left it open; empty where nothing else could be meant.
    """

    run_id: str
    remark: str = ""


def given_name(positional: str | None, option: str | None) -> str | None:
    """The run that the command line names, in one of two places.

    Raises:
        ConfigError: both name one, and they differ.
    """
    if positional is not None and option is not None and positional != option:
        raise ConfigError(f"the command names two runs, {positional} and --run {option}; name one")
    return positional or option


def choose_to_show(runs: Sequence[RunSummary], given: str | None) -> Choice:
    """The run to look at: the newest where none is named.

    Args:
        runs: all runs, oldest first.
        given: name or id that the operator gave; None if none.

    Raises:
        ConfigError: several runs have the name.
    """
    if given is not None:
        return Choice(_find(runs, given))
    if len(runs) < 2:
        return Choice(LATEST)
    newest = runs[-1].run_id
    return Choice(newest, f"run {newest}, the newest of {len(runs)}; --run NAME takes another")


def choose_open(runs: Sequence[RunSummary], given: str | None) -> Choice:
    """The run to stop, pause or resume: where none is named, the only one that has not ended.

    Args:
        runs: all runs, oldest first.
        given: name or id that the operator gave; None if none.

    Raises:
        ConfigError: several runs have not ended, or have the name; lists them.
    """
    if given is not None:
        return Choice(_find(runs, given))
    stoppable = [run for run in runs if run.state in OPEN]
    if len(stoppable) > 1:
        raise ConfigError(
            f"{len(stoppable)} runs have not ended, and none is named: {_listed(stoppable)}; "
            "say which one with --run NAME"
        )
    return Choice(stoppable[0].run_id if stoppable else LATEST)


def _find(runs: Sequence[RunSummary], given: str) -> str:
    """The id of the run that has this id or this name; what no run has is left for the coordinator to refuse."""
    if any(run.run_id == given for run in runs):
        return given
    named = [run for run in runs if run.name == given]
    if len(named) > 1:
        raise ConfigError(f"{len(named)} runs are called {given}: {_listed(named)}; give the id of one")
    return named[0].run_id if named else given


def _listed(runs: Sequence[RunSummary]) -> str:
    return ", ".join(f"{run.run_id} ({run.state})" for run in runs)
