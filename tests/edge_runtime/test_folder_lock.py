"""A folder for one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.folder_lock import claim_folder


def claim(folder: Path) -> BinaryIO:
    """The lock of a folder."""
    return claim_folder(folder / "lock", what=f"folder {folder}", who="writer")


def test_a_second_claim_names_the_first_process(tmp_path: Path) -> None:
    """Who comes second is told which process has the folder, and may have it once that gives it up."""
    first = claim(tmp_path)
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path)
    assert str(caught.value) == (
        f"another writer uses folder {tmp_path} (process {os.getpid()}); stop it, or give each a folder of its own"
    )
    first.close()
    claim(tmp_path).close()


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path) -> None:
    """The lock of a process that was killed is gone with it, though its file stays."""
    program = (
        "import sys, time; from pathlib import Path; from edge_runtime.folder_lock import claim_folder\n"
        "held = claim_folder(Path(sys.argv[1]), what='it', who='writer'); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {process.pid}"):
        claim(tmp_path)
    process.kill()
    process.communicate()
    claim(tmp_path).close()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
