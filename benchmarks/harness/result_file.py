"""Result files: the figures of one benchmark, with everything needed to get them again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
VERSIONED = ("onnxruntime", "numpy", "tokenizers", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what was measured.
        value: median over the repetitions.
        unit: ``bytes``, ``seconds``, ``times`` or another word that follows the number.
        reach: value to reach; None where nothing is promised.
        met: whether it was reached; None without ``reach``.
        low: smallest value over the repetitions.
        high: largest value over the repetitions.
    """

    name: str
    value: float
    unit: str
    reach: float | None
    met: bool | None
    low: float
    high: float


def figure(name: str, unit: str, repeated: Sequence[float], reach: float | None = None) -> Figure:
    """The figure of several repetitions; a ``reach`` is met by a median that is not above it."""
    value = median(repeated)
    met = None if reach is None else value <= reach
    return Figure(name, _shown(value), unit, reach, met, _shown(min(repeated)), _shown(max(repeated)))


#: Condition of a result file: commits of rows that were measured by an earlier command, by their names.
EARLIER = "commits of rows measured earlier"


def earlier_rows(path: Path, titles: Sequence[str]) -> tuple[list[Figure], dict[str, str]]:
    """Rows that a result file has of other subjects, for a bench that measures some subjects at a time.

    Args:
        path: result file; it need not be there.
        titles: what names of rows begin with that are measured anew.

    Returns:
        The other rows, and the commit that each was measured at, by name.
    """
    if not path.is_file():
        return [], {}
    document = json.loads(path.read_text())
    before = document["conditions"].get(EARLIER, {})
    rows = [Figure(**row) for row in document["rows"] if not row["name"].startswith(tuple(titles))]
    return rows, {row.name: before.get(row.name, document["commit"]) for row in rows}


def write_result(
    path: Path, command: str, threads: int, figures: Sequence[Figure], conditions: dict[str, Any]
) -> dict[str, Any]:
    """Write a result file.

    Args:
        path: file to write.
        command: command that measures the figures again.
        threads: threads that what was measured ran on.
        figures: rows of the table.
        conditions: whatever else is needed to measure the same again.

    Returns:
        The document that was written.
    """
    document = {
        "command": command,
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
        "threads": threads,
        "conditions": conditions,
        "rows": [asdict(row) for row in figures],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    return document


def _shown(value: float) -> float:
    """Bytes stay whole numbers; other values keep four digits, which is more than repetitions agree on."""
    return value if isinstance(value, int) else float(f"{value:.4g}") if value < 1e4 else round(value)


def _commit() -> str:
    """The commit that was measured, marked if tracked files differ from it; other result files may differ."""
    known = _git("describe", "--always", "--abbrev=40", "--exclude=*")
    changed = _git("diff", "--name-only", "HEAD", "--", ":/", f":(exclude){RESULTS.name}")
    return f"{known}-dirty" if changed else known or "unknown"


def _git(*arguments: str) -> str:
    """What git answers in this folder; nothing where there is no repository."""
    command = ["git", *arguments]
    folder = RESULTS.parent
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def _machine() -> dict[str, Any]:
    return {
        "cpu": _first_value(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": int((_first_value(Path("/proc/meminfo"), "MemTotal") or "0 kB").split()[0]) * 1024,
        "kernel": platform.release(),
    }


def _first_value(path: Path, key: str) -> str | None:
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
