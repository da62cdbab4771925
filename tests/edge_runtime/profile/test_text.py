from __future__ import annotations

import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.profile.document import Bin, Comparison, Growth, LiveTensor, compare
from edge_runtime.profile.text import COLUMNS, charge_line, render_text
from tests.edge_runtime.profile.profiles import FAILED, PROFILE, mib

NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=120
)


def test_the_verdict_comes_first() -> None:
    """The first line says whether the run passed, with peak, cap and headroom."""
    assert render_text(PROFILE).startswith(
        "PASS  measured 97.3 MiB of a cap of 128.0 MiB, 24 % headroom\n      Enforced: the kernel held the worker"
    )


def test_a_failed_run_gives_every_reason() -> None:
    """Kill, broken cap and leak are each said in a sentence under the verdict."""
    text = render_text(FAILED)
    assert text.startswith("FAIL  measured 131.4 MiB of a cap of 128.0 MiB, 3.40 MiB over the cap\n")
    for reason in (
        "The kernel ended the worker",
        "lies 3.40 MiB above the cap",
        "Memory grows with each step",
    ):
        assert reason in text


def test_a_cap_missed_by_little_is_still_seen() -> None:
    """A peak that rounds to the cap tells in KiB how far it lies above."""
    assert "4.0 KiB over the cap" in render_text(replace(PROFILE, peak_bytes=PROFILE.cap_bytes + 4096))


@pytest.mark.parametrize(
    ("charged", "expected"),
    [
        (None, "no second figure"),
        (mib(84.1), "13.2 MiB less than the measured peak"),
        (mib(107.4), "10.1 MiB more than the measured peak"),
        (PROFILE.peak_bytes, "exactly the measured peak"),
    ],
)
def test_the_gap_between_both_figures_is_explained(charged: int | None, expected: str) -> None:
    """The kernel's charge may be missing, lower, higher or equal, and the sentence says which."""
    assert expected in charge_line(replace(PROFILE, charged_peak_bytes=charged))


def test_a_rest_too_large_is_flagged() -> None:
    """Where the bins do not account for the peak, the report says so instead of looking complete."""
    short = replace(PROFILE, bins=PROFILE.bins[:-3])
    assert "too much" in render_text(short)
    assert "do not account for the peak" in " ".join(render_text(short).split())
    double = replace(PROFILE, bins=(Bin("all", mib(98), mib(120)),))
    assert "is counted in more than one part" in render_text(double)


def test_what_was_not_measured_is_not_made_up() -> None:
    """Missing parts are said to be missing."""
    bare = replace(
        PROFILE, timeline=(), phases=(), tensors=(), what_if=(), growth=None, comparisons=(), step_s=None
    )
    text = render_text(bare)
    for line in ("No timeline was taken.", "No leak check was run.", "no step was finished"):
        assert line in text


def test_the_chosen_option_and_those_that_do_not_fit_are_told_in_words() -> None:
    """The what-if table marks its rows with text."""
    rows = [
        line
        for line in render_text(PROFILE).splitlines()
        if line.endswith(("fits", "does not fit", "chosen"))
    ]
    assert sum(line.endswith("fits, chosen") for line in rows) == 1
    assert sum(line.endswith("does not fit") for line in rows) == 1
    assert len(rows) == len(PROFILE.what_if)


def test_the_command_can_be_pasted_into_a_shell() -> None:
    """A long command is broken so that a shell takes it as one."""
    text = render_text(PROFILE)
    start = text.index("edge-runtime profile")
    pasted = text[start : text.index("\n\n", start)]
    assert "\\\n" in pasted
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {pasted}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == PROFILE.identity.command.split(" ")


def test_a_comparison_is_part_of_the_text() -> None:
    """Against an earlier report the text gives the outcome, what else differs, and the bins."""
    text = render_text(FAILED, compare(PROFILE, FAILED))
    assert "REGRESSED: the peak grew by more than 5.0 %: 97.3 MiB before, 131.4 MiB now (+35 %)." in text
    assert "! enforced by was cgroup_v2, is cgroup_v1" in text
    assert re.search(r"step +960 ms +not measured +not in both", text)
    assert "No regression" in render_text(PROFILE, compare(PROFILE, PROFILE))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(name=NAMES, shape=NAMES, bytes_=st.integers(0, 1 << 50), slope=st.floats(-1e15, 1e15))
def test_no_line_is_too_long_for_a_terminal(name: str, shape: str, bytes_: int, slope: float) -> None:
    """Whatever the names and sizes, no line exceeds 100 columns."""
    profile = replace(
        PROFILE,
        identity=replace(PROFILE.identity, device=name, package_name=shape, command=f"{name} {shape} " * 4),
        work=replace(PROFILE.work, slices=(name,) * 50, gave_up=(shape,)),
        bins=(Bin(name, bytes_, bytes_, shape),),
        tensors=(LiveTensor(name, shape, name, shape, bytes_),),
        comparisons=(Comparison(name, bytes_ + 1, None, shape * 3),),
        growth=Growth(100, bytes_, bytes_, slope, 0.0),
    )
    text = render_text(profile, compare(PROFILE, profile, unlike=True))
    assert max(map(len, text.split("\n"))) <= COLUMNS
