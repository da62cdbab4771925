import sys
from pathlib import Path

import pytest

from benchmarks.harness.arguments import bench_parser, command_line


def test_a_bench_has_only_the_options_it_gives_a_default_for() -> None:
    """Defaults are the bench's own, and an option without a default is not accepted."""
    parser = bench_parser("a bench", Path("result.json"), folder="build/here", repetitions=3)
    assert vars(parser.parse_args([])) == {
        "folder": Path("build/here"),
        "repetitions": 3,
        "threads": 2,
        "output": Path("result.json"),
    }
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "2"])


@pytest.mark.parametrize(
    ("given", "command"),
    [([], "make bench"), (["--steps", "2"], "python -m benchmarks.memory.first_figures --steps 2")],
)
def test_a_result_names_the_command_that_repeats_it(monkeypatch, given: list[str], command: str) -> None:
    """Without options that is the make target, with some the module and the same options."""
    monkeypatch.setattr(sys, "argv", ["first_figures.py", *given])
    assert command_line("benchmarks.memory.first_figures", "bench") == command
