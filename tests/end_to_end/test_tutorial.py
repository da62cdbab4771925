"""The tutorial as its reader runs it: every command block of the page, in order, in one shell, by real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.end_to_end.harness import PATIENCE_S, ROOT

PAGE = ROOT / "docs" / "tutorial.md"
#: A line that opens or closes a block, and the block's language.
FENCE = re.compile(r"^ *```(\S*)$")
#: The page's commands, one after another.
WHOLE_PAGE_PATIENCE_S = 3 * PATIENCE_S
NAMES = {f"device-{number}" for number in range(6)}


def blocks() -> list[tuple[str, str]]:
    """Language and content of the page's blocks, in order."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in PAGE.read_text("utf-8").splitlines():
        if fence := FENCE.match(line):
            if not inside:
                found.append((fence[1], []))
            inside = not inside
        elif inside:
            found[-1][1].append(line)
    assert not inside, "a block is never closed"
    return [(language, "\n".join(lines)) for language, lines in found]


def commands() -> list[str]:
    """The blocks that a reader copies into the shell."""
    return [content for language, content in blocks() if language == "bash"]


def shell(checkout: Path, script: str, model: Path | None) -> str:
    """Run a script as a reader in the root of a checkout does; what it started is gone afterwards.

    Args:
        checkout: gets what the page needs of a real one.
        script: for bash; the first command that fails ends it.
        model: the reader's own model folder; None if the reader has none.

    Returns:
        What it printed.
    """
    checkout.mkdir()
    (checkout / ".venv").symlink_to(sys.prefix)
    (checkout / "examples").symlink_to(ROOT / "examples")
    environment = {name: value for name, value in os.environ.items() if name != "MODEL"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"MODEL": str(model)} if model else {})
    log = checkout / "shell.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=checkout,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(WHOLE_PAGE_PATIENCE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, log.read_text("utf-8")[-4000:]
    return log.read_text("utf-8")


def test_every_block_is_a_command_or_an_output() -> None:
    """Blocks of the page are bash, which is run, or text, which shows what a command printed."""
    assert {language for language, _ in blocks()} == {"bash", "text"}


@pytest.mark.slow
def test_the_page_leads_to_an_adapter(workshop, tmp_path) -> None:
    """With a model of the reader's own the run finishes, all results count, the adapter loads, nothing runs on."""
    printed = shell(tmp_path / "checkout", "\n".join(commands()), workshop.folder / "model")
    folder = tmp_path / "checkout" / "build" / "tutorial"
    run = json.loads((folder / "report" / "report.json").read_bytes())["run"]
    assert run["state"] == "finished"
    assert [set(entry["devices"]) for entry in run["rounds"]] == [NAMES] * run["rounds_wanted"]
    written = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "head.json"} <= written
    right = re.search(r"^(\d+) of 100 right$", printed, re.MULTILINE)
    assert right
    # The devices' base is quantised, the reader's is not: a few rows may differ.
    assert abs(int(right[1]) / 100 - run["rounds"][-1]["accuracy"]) <= 0.05
    for name in NAMES:
        assert "phase=stopped pending=False" in (folder / name / "device.log").read_text()
    assert "Application shutdown complete" in (folder / "coordinator.log").read_text()


def test_a_reader_without_a_model_gets_the_installed_one(tmp_path) -> None:
    """Where MODEL is not set, the page takes the model folder that ``make setup`` installs."""
    printed = shell(tmp_path / "checkout", "\n".join(commands()[:2]), None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(printed.split())
