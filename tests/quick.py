"""Which tests are quick: they export no model, load no torch and start no process. ``make test-quick`` runs them alone.

Nobody marks them by hand. A test is quick unless its file, the conftest.py of its folder, or a file of tests/ that
these import names one of SLOW, or the test asks for MODEL. What reading the files cannot show is caught while the test
runs: a quick test that starts a process or loads torch all the same fails, in ``make test`` as well.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: Modules that load torch or start processes; a name stands for everything inside it.
SLOW = (
    *("executorch", "export", "peft", "ray", "tensorboardX", "torch", "transformers"),
    *(
        "benchmarks.harness.measured_process",
        "benchmarks.harness.result_file",
        "coordinator.rounds.evaluation",
    ),
    *("edge_runtime.serving.http_server", "edge_runtime.serving.session", "edge_runtime.serving.source"),
    *("edge_runtime.worker.process", "multiprocessing", "subprocess"),
)
#: The fixture of tests/conftest.py that every other one there is made from.
MODEL = "tiny_model"
STARTS = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen")
_running: list[str] = []


def is_quick(item: pytest.Item) -> bool:
    """Whether a test is quick."""
    return file_is_quick(item.path) and MODEL not in getattr(item, "fixturenames", ())


@functools.cache
def file_is_quick(path: Path) -> bool:
    """Whether neither a file, nor the conftest.py of its folder, nor what they import of tests/ names anything slow."""
    folders = [folder for folder in path.parents if TESTS in folder.parents]
    conftests = [folder / "conftest.py" for folder in folders if (folder / "conftest.py").exists()]
    seen, waiting = set[str](), [path, *conftests]
    while waiting:
        for name in _imports(waiting.pop()) - seen:
            if any(name == slow or name.startswith(f"{slow}.") for slow in SLOW):
                return False
            seen.add(name)
            file = TESTS.parent / f"{name.replace('.', '/')}.py"
            if name.startswith("tests.") and file.is_file():
                waiting.append(file)
    return True


@functools.cache
def _imports(path: Path) -> set[str]:
    """Modules a file imports, anywhere in it; of ``from a import b`` both ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return names


@contextmanager
def watched(item: pytest.Item) -> Iterator[None]:
    """While a quick test runs, what makes tests slow is an error."""
    if item.get_closest_marker("quick") is None:
        yield
        return
    _running.append(item.nodeid)
    try:
        yield
    finally:
        _running.pop()


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    loads_torch = event == "import" and arguments[0] == "torch"
    if _running and (loads_torch or event in STARTS):
        raise RuntimeError(
            f"{_running[-1]} counts as quick (tests/quick.py), but it does {event} {arguments[0]}"
        )


def watch() -> None:
    """Begin to notice; Python offers no end."""
    sys.addaudithook(_refuse)
