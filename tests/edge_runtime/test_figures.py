"""Sizes, times and shares in words."""

from __future__ import annotations

import pytest

from edge_runtime.figures import MIB, column_mib, duration, plural, share, size, whole_size


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(0), "0 bytes"),
        (size(1), "1 byte"),
        (size(256), "256 bytes"),
        (size(1023), "1023 bytes"),
        (size(1024), "1.0 KiB"),
        (size(4096), "4.0 KiB"),
        (size(-4096), "-4.0 KiB"),
        (size(MIB), "1.00 MiB"),
        (size(5 * MIB), "5.00 MiB"),
        (size(-20 * MIB), "-20.0 MiB"),
        (size(3 << 30), "3.00 GiB"),
        (whole_size(256), "256 bytes"),
        (whole_size(96 * MIB + 1), "96 MiB"),
        (whole_size(96 * MIB + 1, up=True), "97 MiB"),
        (whole_size(2 << 30), "2048 MiB"),
        (column_mib(None), "not measured"),
        (column_mib(0), "0.00"),
        (column_mib(100), "< 0.01"),
        (column_mib(-100), "> -0.01"),
        (duration(None), "not measured"),
        (duration(0), "0 s"),
        (duration(0.00042), "420 µs"),
        (duration(0.0421), "42 ms"),
        (duration(3.0), "3 s"),
        (duration(59.9), "59.9 s"),
        (duration(59.99), "1 min"),
        (duration(194.2), "3 min 14 s"),
        (duration(3600), "1 h"),
        (duration(7530), "2 h 5 min"),
        (share(0.0123), "1.2 %"),
        (share(0.24), "24 %"),
        (share(-0.5, signed=True), "-50 %"),
        (share(0, signed=True), "0 %"),
        (plural(1, "row"), "1 row"),
        (plural(1000, "row"), "1,000 rows"),
    ],
)
def test_figures_are_written_as_people_read_them(shown: str, expected: str) -> None:
    """Sizes, times and shares have a unit and as many digits as say something."""
    assert shown == expected
