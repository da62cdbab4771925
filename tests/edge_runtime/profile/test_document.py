from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.errors import ConfigError
from edge_runtime.profile.document import (
    FORMAT_VERSION,
    MAX_DOCUMENT_BYTES,
    MAX_SAMPLES,
    UNEXPLAINED,
    Bin,
    Growth,
    Profile,
    TimelineSample,
    compare,
    decode_profile,
    encode_profile,
    thin,
)
from tests.edge_runtime.profile.profiles import FAILED, MIB, PROFILE, mib

SIZES = st.integers(0, 1 << 50)


def changed(path: str, value: Any) -> bytes:
    """The example's JSON with one field, such as ``bins.0.name``, set to another value."""
    document = json.loads(encode_profile(PROFILE))
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize("profile", [PROFILE, FAILED], ids=["passed", "failed"])
def test_a_report_reads_back_as_it_was_written(profile: Profile) -> None:
    """Nothing is lost or changed on the way through JSON."""
    assert decode_profile(encode_profile(profile)) == profile


def test_the_json_tells_programs_what_follows_from_the_figures() -> None:
    """The derived values stand beside the measured ones."""
    derived = json.loads(encode_profile(FAILED))["derived"]
    assert derived["verdict"] == "FAIL"
    assert derived["failures"] == ["killed", "over_cap", "leak"]
    assert derived["headroom_bytes"] == FAILED.cap_bytes - FAILED.peak_bytes
    assert derived["peak_phase"] == "step"


def test_a_forged_verdict_is_not_believed() -> None:
    """What follows from the figures is worked out again when a report is read."""
    document = json.loads(encode_profile(FAILED))
    document["derived"]["verdict"] = "PASS"
    assert decode_profile(json.dumps(document).encode()).verdict == "FAIL"


@pytest.mark.parametrize(
    ("fields", "failures"),
    [
        ({}, ()),
        ({"peak_bytes": PROFILE.cap_bytes}, ()),
        ({"peak_bytes": PROFILE.cap_bytes + 1}, ("over_cap",)),
        ({"charged_peak_bytes": PROFILE.cap_bytes + 1}, ("charge_over_cap",)),
        ({"charged_peak_bytes": None}, ()),
        ({"killed": True}, ("killed",)),
        ({"growth": None}, ()),
        ({"growth": Growth(100, 0, 100, 1.0, 1.0)}, ()),
        ({"growth": Growth(100, 0, 101, 1.01, 1.0)}, ("leak",)),
        ({"growth": Growth(100, 100, 0, -1.0, 0.0)}, ()),
    ],
)
def test_a_run_passes_only_without_any_failure(fields: dict[str, Any], failures: tuple[str, ...]) -> None:
    """Peak and charge may reach the cap and no more, the worker must live, and no step may leak."""
    profile = replace(PROFILE, **fields)
    assert profile.failures == failures
    assert profile.verdict == ("FAIL" if failures else "PASS")


def test_headroom_and_errors_are_shares_of_what_they_say() -> None:
    """Headroom is a share of the cap; prediction error and unexplained rest are shares of the peak."""
    profile = replace(
        PROFILE, cap_bytes=200, peak_bytes=100, predicted_peak_bytes=90, bins=(Bin("all", 90, 97),)
    )
    assert (profile.headroom_bytes, profile.headroom_share) == (100, 0.5)
    assert profile.prediction_error == pytest.approx(-0.1)
    assert (profile.unexplained_bytes, profile.unexplained_share, profile.is_explained) == (3, 0.03, True)
    assert not replace(profile, bins=(Bin("all", 90, 95),)).is_explained
    assert not replace(profile, bins=(Bin("all", 90, 106),)).is_explained


def test_the_first_of_the_highest_phases_owns_the_peak() -> None:
    """The owner is the phase with the highest mark, and nobody where no phase was measured."""
    assert PROFILE.owner is not None
    assert PROFILE.owner.name == "step"
    assert replace(PROFILE, phases=()).owner is None


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    predicted=st.integers(1, 1 << 50),
    peak=st.integers(1, 1 << 50),
    sizes=st.lists(st.tuples(SIZES, st.none() | SIZES), max_size=8),
)
def test_the_ledger_sums_up_to_both_peaks(
    predicted: int, peak: int, sizes: list[tuple[int, int | None]]
) -> None:
    """With the unexplained rest, either column of the bins adds up exactly, also where bins overlap."""
    bins = tuple(Bin(f"bin {index}", *pair) for index, pair in enumerate(sizes))
    ledger = replace(PROFILE, predicted_peak_bytes=predicted, peak_bytes=peak, bins=bins).ledger
    assert sum(row.predicted_bytes for row in ledger) == predicted
    assert sum(row.measured_bytes or 0 for row in ledger) == peak
    assert ledger[-1].name == UNEXPLAINED


@settings(max_examples=50, deadline=None, derandomize=True)
@given(heights=st.lists(st.integers(0, 1000), max_size=60), count=st.integers(3, 20))
def test_thinning_never_loses_the_peak(heights: list[int], count: int) -> None:
    """A thinned timeline keeps its ends, its order and its highest sample, and no more than asked for."""
    samples = tuple(TimelineSample(float(i), "step", height, height, 0) for i, height in enumerate(heights))
    thinned = thin(samples, count)
    assert len(thinned) <= max(count, 0)
    assert [s for s in samples if s in thinned] == list(thinned)
    assert thinned[:1] == samples[:1]
    assert thinned[-1:] == samples[-1:]
    if samples:
        assert max(samples, key=lambda s: s.resident_bytes) in thinned


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_report_or_one_line_of_error(data: bytes) -> None:
    """Garbage never gets further than a typed error of one line."""
    with pytest.raises(ConfigError) as caught:
        decode_profile(data)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("cap_bytes", 0, "$.cap_bytes"),
        ("peak_bytes", -1, "$.peak_bytes"),
        ("peak_bytes", 1 << 60, "$.peak_bytes"),
        ("created", "yesterday", "$.created"),
        ("judge", "nobody", "$.judge"),
        ("step_s", 1e10, "$.step_s"),
        ("identity.package_sha256", "ab", "$.identity.package_sha256"),
        ("identity.device", "two\nlines", "$.identity.device"),
        ("identity.device", "red \x1b[31m", "$.identity.device"),
        ("identity.device", "turned \u202e", "$.identity.device"),
        ("identity.device", "x" * 121, "$.identity.device"),
        ("judge_note", "x" * 1001, "$.judge_note"),
        ("work.weights", "gone", "$.work.weights"),
        ("bins.1.measured_bytes", -5, "$.bins[1].measured_bytes"),
        ("bins.1.name", "libraries", "$.bins"),
        ("bins.1.name", UNEXPLAINED, "$.bins"),
        ("phases.1.name", "start", "$.phases"),
        ("timeline.3.seconds", 0.0, "$.timeline[3].seconds"),
        ("what_if.0.chosen", True, "$.what_if"),
        ("growth.per_step_bytes", 1e300, "$.growth.per_step_bytes"),
        ("format_version", 0, "$.format_version"),
    ],
)
def test_a_field_out_of_bounds_is_named(path: str, value: Any, field: str) -> None:
    """Every bound that is broken leads to an error that names the field."""
    with pytest.raises(ConfigError, match="malformed memory report") as caught:
        decode_profile(changed(path, value))
    assert field in str(caught.value)


@pytest.mark.parametrize("field", ["bins", "timeline", "phases", "tensors", "what_if", "comparisons"])
def test_a_list_out_of_bounds_is_named(field: str) -> None:
    """No list may be longer than its limit."""
    one = json.loads(encode_profile(PROFILE))[field][0]
    with pytest.raises(ConfigError, match=rf"\$\.{field}"):
        decode_profile(changed(field, [one] * (MAX_SAMPLES + 1)))


def test_a_newer_report_is_refused_with_advice() -> None:
    """A report of a later format says so, instead of complaining about some field."""
    with pytest.raises(ConfigError, match="newer edge-runtime"):
        decode_profile(b'{"format_version": %d}' % (FORMAT_VERSION + 1))


def test_a_huge_report_is_refused_unread() -> None:
    """The limit of size comes before any parsing."""
    with pytest.raises(ConfigError, match=str(MAX_DOCUMENT_BYTES)):
        decode_profile(b" " * (MAX_DOCUMENT_BYTES + 1))


def test_deep_nesting_is_refused() -> None:
    """Nesting without end is an error like any other."""
    with pytest.raises(ConfigError, match="malformed"):
        decode_profile(b'{"format_version": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@pytest.mark.parametrize("bad", [{"step_s": math.nan}, {"step_s": math.inf}, {"peak_bytes": 0}])
def test_what_could_not_be_read_back_is_not_written(bad: dict[str, Any]) -> None:
    """Writing holds to the same bounds as reading."""
    with pytest.raises(ConfigError, match="cannot be written"):
        encode_profile(replace(PROFILE, **bad))


def test_the_peak_regresses_only_beyond_the_tolerance() -> None:
    """Growth up to the tolerance passes, one byte more does not."""
    old = replace(PROFILE, peak_bytes=100 * MIB)
    assert not compare(old, replace(old, peak_bytes=105 * MIB)).regressed
    assert compare(old, replace(old, peak_bytes=105 * MIB + 1)).regressed
    assert not compare(old, replace(old, peak_bytes=50 * MIB)).regressed
    assert compare(old, replace(old, peak_bytes=100 * MIB + 1), tolerance=0).regressed


def test_a_comparison_names_what_grew() -> None:
    """Bins, charge and step time that grew are named; what one report lacks is neither grown nor shrunk."""
    bins = tuple(replace(b, measured_bytes=mib(20)) if b.name == "live tensors" else b for b in PROFILE.bins)
    new = replace(PROFILE, peak_bytes=mib(107.4), step_s=2.0, charged_peak_bytes=None, bins=bins)
    difference = compare(PROFILE, new)
    assert [change.name for change in difference.grown] == ["peak", "step", "live tensors"]
    charge = next(change for change in difference.changes if change.name == "kernel's charge")
    assert charge.share is None


def test_every_bin_of_either_report_is_compared_once() -> None:
    """Bins that only one of the reports has are listed too."""
    old = replace(PROFILE, bins=(Bin("a", 1, 1), Bin("b", 2, 2)))
    new = replace(PROFILE, bins=(Bin("b", 2, 2), Bin("c", 3, 3)))
    assert [change.name for change in compare(old, new).bins] == ["b", "c", UNEXPLAINED, "a"]


def test_other_work_is_compared_only_on_demand_and_never_silently() -> None:
    """Reports of other packages or work are refused, or compared with a line about each difference."""
    other = replace(
        PROFILE,
        identity=replace(PROFILE.identity, package_name="bert"),
        work=replace(PROFILE.work, draws=4),
    )
    with pytest.raises(ConfigError, match="package name was minilm-banking77, is bert; draws was 1, is 4"):
        compare(PROFILE, other)
    notes = compare(PROFILE, other, unlike=True).notes
    assert notes == (
        "other work: package name was minilm-banking77, is bert",
        "other work: draws was 1, is 4",
    )


def test_another_device_or_cap_is_noted() -> None:
    """A change of surroundings is not taken for one of the program."""
    other = replace(PROFILE, cap_bytes=mib(64), identity=replace(PROFILE.identity, device="pi-5"))
    assert compare(PROFILE, other).notes == (
        "device was raspberry-pi-4, is pi-5",
        f"cap bytes was {mib(128)}, is {mib(64)}",
    )


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_that_means_nothing_is_refused(tolerance: float) -> None:
    """A tolerance is a share between 0 and 10."""
    with pytest.raises(ConfigError, match="tolerance"):
        compare(PROFILE, PROFILE, tolerance)


def test_the_report_needs_none_of_the_heavy_libraries() -> None:
    """Reading and rendering a report imports neither numpy nor an engine."""
    code = (
        "import sys, edge_runtime.profile.page; "
        "print(*{'numpy', 'onnxruntime', 'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
