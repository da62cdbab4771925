"""What a process does to hold little memory, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json
import numpy as np
import onnxruntime
from edge_runtime.memory.meter import status_bytes
from edge_runtime.memory.allocator import keep_freed_memory, release_library_code, return_freed_memory

keep_freed_memory()
before = status_bytes("RssFile")
release_library_code()
after = status_bytes("RssFile")
eye = np.eye(64, dtype=np.float32)
works = bool((eye @ eye == eye).all()) and onnxruntime.get_available_providers() != []
blocks = [bytearray(1000) for _ in range(20000)]
full = status_bytes("RssAnon")
del blocks
kept = status_bytes("RssAnon")
return_freed_memory()
print(json.dumps({"before": before, "after": after, "works": works, "full": full, "kept": kept,
                  "returned": status_bytes("RssAnon")}))
"""


def measured() -> dict[str, int]:
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True).stdout
    return json.loads(output)


def test_library_code_is_given_back_and_still_runs() -> None:
    """After the imports at least a third of all file pages go, and numpy and the engine work as before."""
    found = measured()
    assert found["after"] < found["before"] * 2 / 3
    assert found["works"]


def test_freed_memory_is_kept_until_it_is_returned() -> None:
    """Freed blocks stay with the process for reuse; told so, it gives most of them back to the kernel."""
    found = measured()
    block_bytes = 20_000_000
    assert found["full"] - found["kept"] < block_bytes / 4
    assert found["kept"] - found["returned"] > block_bytes / 2
