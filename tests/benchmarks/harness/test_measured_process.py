import sys

import pytest

from benchmarks.harness.measured_process import ProgramFailedError, run_measured

TAKE = "import sys; kept = b'x' * (int(sys.argv[1]) << 20); print(len(kept))"
MIB = 1 << 20


def take(mib: int) -> list[str]:
    return [sys.executable, "-c", TAKE, str(mib)]


def test_the_peak_follows_what_a_program_takes() -> None:
    """100 MiB more in the program are 100 MiB more in the kernel's charge; ru_maxrss is never below them."""
    small, large = run_measured(take(1)), run_measured(take(101))
    assert large.max_resident_bytes > 100 * MIB
    if large.cgroup_peak_bytes is None or small.cgroup_peak_bytes is None:
        assert "no memory cgroup" in large.note
    else:
        assert large.cgroup_peak_bytes - small.cgroup_peak_bytes == pytest.approx(100 * MIB, abs=8 * MIB)
        assert large.note == ""


def test_a_program_over_its_limit_is_killed_and_named() -> None:
    """The limit is enforced by the kernel, and the error says what ran under which limit."""
    if run_measured(take(1)).note:
        pytest.skip("no memory cgroup can be made here")
    with pytest.raises(ProgramFailedError, match=rf"SIGKILL under a limit of {40 * MIB}"):
        run_measured(take(200), limit_bytes=40 * MIB)


def test_input_and_output_pass_through() -> None:
    """A program reads what it is given and its answer comes back whole."""
    echo = [sys.executable, "-c", "import sys; sys.stdout.write(sys.stdin.read() * 2)"]
    assert run_measured(echo, b"abc" * 100_000).output == b"abc" * 200_000


def test_children_count_beside_their_parent() -> None:
    """A child's own peak is added up, also if the program outlives it."""
    child = f"kept = b'x' * {60 * MIB}; import time; time.sleep(0.5)"
    parent = [
        sys.executable,
        "-c",
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
    ]
    assert run_measured(parent).children_peak_bytes > 60 * MIB
    assert run_measured(take(1)).children_peak_bytes == 0


def test_a_failing_program_is_reported_with_what_it_wrote() -> None:
    """The error holds exit code and standard error."""
    with pytest.raises(ProgramFailedError, match=r"exit code 3\n(?s:.*)broken"):
        run_measured([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"])


def test_a_program_that_does_not_end_is_killed() -> None:
    """After its time a program is killed and the run is an error."""
    with pytest.raises(ProgramFailedError, match="SIGKILL"):
        run_measured([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.3)
