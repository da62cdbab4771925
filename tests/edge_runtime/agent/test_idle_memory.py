import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.edge_runtime.test_cli import url, write_config

__all__ = ["url"]  # the stub coordinator, a fixture

#: What an idle agent may take, at its peak, including enrolment and a check-in: 40 MB, and one that libraries of other
#: machines may differ by.
LIMIT_BYTES = 41 * 1_000_000


def memory_bytes(process_id: int, name: str) -> int:
    status = Path(f"/proc/{process_id}/status").read_text()
    match = re.search(rf"^{name}:\s+(\d+) kB", status, flags=re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def wait_for(log: Path, text: str) -> None:
    deadline_s = time.monotonic() + 30
    while text not in log.read_text():
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)


def test_an_idle_agent_is_small_and_stops_quickly(tmp_path, url) -> None:
    """A real agent that has enrolled and waits stays under 41 MB, and ends cleanly on SIGTERM."""
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.cli", "run", "--config", write_config(tmp_path, url)],
            stderr=stream,
        )
    try:
        wait_for(log, "phase=waiting")
        resident, peak = memory_bytes(process.pid, "VmRSS"), memory_bytes(process.pid, "VmHWM")
        print(f"idle agent: VmRSS {resident / 1e6:.1f} MB, VmHWM {peak / 1e6:.1f} MB")
        started_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - started_s < 10
    finally:
        process.kill()
        process.wait()
    assert "phase=stopped pending=False" in log.read_text()
    assert resident <= peak < LIMIT_BYTES
