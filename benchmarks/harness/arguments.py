"""The options that the benches share, and the command that a result file names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def bench_parser(
    description: str,
    result: Path,
    *,
    folder: str | None = "build/bench-memory",
    repetitions: int | None = None,
    steps: int | None = None,
) -> argparse.ArgumentParser:
    """A parser with ``--threads``, ``--output`` and those of the others that a bench has.

    Args:
        description: one line for ``--help``.
        result: default of ``--output``, the result file.
        folder: default of ``--folder``, where models and packages are kept; None leaves the option out.
        repetitions: default of ``--repetitions``; None leaves the option out.
        steps: default of ``--steps``, the timed steps of a process; None leaves the option out.
    """
    parser = argparse.ArgumentParser(description=description)
    if folder is not None:
        parser.add_argument("--folder", type=Path, default=Path(folder), help="for models and packages")
    if repetitions is not None:
        parser.add_argument("--repetitions", type=int, default=repetitions)
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=result)
    return parser


def command_line(module: str, target: str) -> str:
    """The command to repeat this run: ``make TARGET``, or the module with its options if it was given any."""
    return " ".join([f"python -m {module}", *sys.argv[1:]]) if sys.argv[1:] else f"make {target}"
