"""What an operator sees: lines in a file, a bar on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

from coordinator.simulation.config import read_simulation_config
from coordinator.simulation.report.progress import progress_for
from coordinator.simulation.sweep import Options, make_plan, sweep
from tests.coordinator.simulation.conftest import Workshop


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(workshop: Workshop, out: io.StringIO, folder: Path) -> str:
    """What a sweep writes to ``out``."""
    plan = make_plan(read_simulation_config(workshop.write()), Options(folder, threads=1))
    with progress_for(1, out) as progress:
        sweep(plan, progress)
    return out.getvalue()


def test_a_file_gets_a_line_for_each_evaluated_round(workshop: Workshop) -> None:
    """Each evaluation is told once, with accuracy and loss, then how the arm ended; a second call says it had."""
    lines = shown(workshop, io.StringIO(), workshop.folder / "out").splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == [f"ours-seed0: {n}/6 rounds" for n in (0, 2, 4, 6)]
    assert all("accuracy" in line and "loss" in line for line in lines[:-1])
    assert lines[-1] == "ours-seed0: finished"
    assert shown(workshop, io.StringIO(), workshop.folder / "out") == "ours-seed0: finished before\n"


def test_a_terminal_gets_a_bar(workshop: Workshop) -> None:
    """On a terminal the bar counts arms, and the end of each arm stays on the screen."""
    text = shown(workshop, Terminal(), workshop.folder / "out")
    assert "ours-seed0: finished" in text
    assert "1/1" in text
    assert "1/1" in shown(workshop, Terminal(), workshop.folder / "out")
