"""A coordinator process on a state folder that is there already."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(state: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A coordinator on a free port: its address and its process."""
    (state / "url").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "coordinator.cli", "serve", "--state", str(state), "--port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    try:
        while not (state / "url").exists():
            if process.poll() is not None:
                raise RuntimeError(f"the coordinator ended with {process.returncode}")
            time.sleep(0.05)
        time.sleep(0.3)
        yield (state / "url").read_text().strip(), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()
