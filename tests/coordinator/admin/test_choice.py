"""Which run is meant: by id, by name, or left open."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.admin.choice import LATEST, Choice, choose_open, choose_to_show, given_name
from coordinator.config import run_config
from coordinator.rounds.summary import RunSummary
from edge_runtime.errors import ConfigError
from tests.coordinator.conftest import RUN


def runs(*standing: str) -> list[RunSummary]:
    """Runs from texts such as ``"demo-1 queued"``; the name is what comes before the dash."""
    config = run_config({**RUN, "package": "package", "publisher_key": "A" * 43 + "="})
    one = RunSummary("", "", "", "", 0, 2, None, None, 0.0, None, None, "", "", config)
    made = []
    for text in standing:
        run_id, state = text.split()
        made.append(msgspec.structs.replace(one, run_id=run_id, name=run_id.partition("-")[0], state=state))
    return made


def test_the_newest_is_shown_and_said_so() -> None:
    """Where none is named and there are several, the newest is shown, and the choice is told."""
    choice = choose_to_show(runs("demo-1 finished", "other-2 running"), None)
    assert choice == Choice("other-2", "run other-2, the newest of 2; --run NAME takes another")
    assert choose_to_show(runs("demo-1 finished"), None) == Choice(LATEST)
    assert choose_to_show([], None) == Choice(LATEST)


@pytest.mark.parametrize("choose", [choose_to_show, choose_open])
def test_a_run_is_found_by_id_and_by_name(choose: type[object]) -> None:
    """An id or a name that one run has names it, and what no run has is passed on to be refused."""
    there = runs("demo-1 finished", "other-2 running", "third-3 queued")
    for given, found in (("other-2", "other-2"), ("demo", "demo-1"), ("latest", "latest"), ("no", "no")):
        assert choose(there, given) == Choice(found)  # type: ignore[call-arg]


@pytest.mark.parametrize("choose", [choose_to_show, choose_open])
def test_a_name_of_several_runs_names_none(choose: type[object]) -> None:
    """A name that two runs share is refused, with the ids and states of both."""
    with pytest.raises(ConfigError, match=r"2 runs are called demo: demo-1 \(finished\), demo-2 \(queued\)"):
        choose(runs("demo-1 finished", "demo-2 queued"), "demo")  # type: ignore[call-arg]


def test_only_a_choice_without_doubt_is_stopped() -> None:
    """Without a name the one run that has not ended is stopped; of two, none is."""
    assert choose_open(runs("demo-1 running", "demo-2 failed"), None) == Choice("demo-1")
    assert choose_open(runs("demo-1 finished"), None) == Choice(LATEST)
    with pytest.raises(ConfigError, match=r"2 runs have not ended.*demo-1 \(running\), demo-2 \(queued\)"):
        choose_open(runs("demo-1 running", "demo-2 queued"), None)


def test_two_names_are_one_too_many() -> None:
    """A run may be named in either place of a command line, and in both only if they agree."""
    assert given_name("a", None) == given_name(None, "a") == given_name("a", "a") == "a"
    assert given_name(None, None) is None
    with pytest.raises(ConfigError, match="names two runs, a and --run b"):
        given_name("a", "b")
