"""Decoders of bytes from outside: whatever is wrong with them ends in the decoder's own typed error alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.agent.store import IDENTITY, Store
from edge_runtime.config_file import read_toml
from edge_runtime.errors import EdgeError
from edge_runtime.package.manifest import parse_manifest
from edge_runtime.package.slices import decode_values
from edge_runtime.protocol.messages import (
    CheckInRequest,
    CheckInResponse,
    DeviceEvent,
    EnrolRequest,
    MemoryReport,
    Refusal,
    Result,
    Task,
    decode,
    decode_result,
    encode,
    encode_result,
)

RESULT = encode_result(Result("t", "r", 0, 1, 1, 0, 0.5, 1.0, MemoryReport(1, 1, 1), "0" * 64, b"x" * 40))
DEEP = 100_000
#: What broke a decoder somewhere: not UTF-8, too deep, too many digits, lengths that promise more than is there.
NASTY = (
    b"",
    b"\xff\xfe",
    b'"\xff"',
    b'{"code": "\xc3\x28", "message": ""}',
    b'{"code": "\\ud800", "message": "x"}',
    b'{"message": "\xed\xa0\x80", "code": "x"}',
    b"[" * DEEP,
    b'{"a":' * DEEP,
    b'{"code": "x", "message": "m", "unknown": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    b"9" * 5000,
    b'{"cap_bytes": ' + b"9" * 5000 + b"}",
    b'{"cap_bytes": 1e999}',
    b'{"format_version": 1' + b"0" * 400 + b"}",
    b"NaN",
    b"\x00" * 64,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\x91" * DEEP,
    b"\x81\xa1a" * DEEP,
    b"\x81\xa7task_id\xa2\xff\xfe",
    b"\xc9\xff\xff\xff\xff\x01",
    RESULT[:-10],
    RESULT.replace(b"task_id", b"task\xff\xfe\xfd"),
    (1 << 40).to_bytes(8, "little") + b"{}",
    (16).to_bytes(8, "little") + b'{"a": ' + b"[" * 10,
    (2**64 - 1).to_bytes(8, "little"),
    (100_000).to_bytes(8, "little") + b"[" * 100_000,
    b"a = " + b"[" * 5000,
    b"a = " + b"9" * 5000,
    b"a = 0000-99-99T00:00:00Z",
    b"[[[a.b]]]\n" * 3,
)


def identity(data: bytes, folder: Path) -> object:
    """What a device makes of its identity file."""
    store = Store(folder, disk_quota_bytes=1)
    (folder / IDENTITY).write_bytes(data)
    return store.identity()


def toml(data: bytes, folder: Path) -> object:
    """What is made of a configuration file."""
    path = folder / "x.toml"
    path.write_bytes(data)
    return read_toml(path)


DECODERS: dict[str, Callable[[bytes, Path], object]] = {
    **{
        kind.__name__: lambda data, _, kind=kind: decode(data, kind)  # type: ignore[misc]
        for kind in (CheckInRequest, EnrolRequest, DeviceEvent, Refusal, Task)
    },
    "answer": lambda data, _: decode(data, CheckInResponse),  # type: ignore[arg-type]
    "result": lambda data, _: decode_result(data),
    "manifest": lambda data, _: parse_manifest(data),
    "slices": lambda data, _: decode_values(data, []),
    "identity": identity,
    "toml": toml,
}


@pytest.mark.parametrize("name", DECODERS)
def test_nasty_bytes_are_refused_by_type(name: str, tmp_path: Path) -> None:
    """Bytes that are no message end in an error of this project that has one line, in every decoder."""
    for data in NASTY:
        try:
            DECODERS[name](data, tmp_path)
        except EdgeError as error:
            assert len(str(error)) < 20_000


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_break_a_decoder(name: str, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes at random, and messages with a few bytes changed, are decoded or refused by type."""
    message = data.draw(
        st.sampled_from([RESULT, encode(CheckInRequest("x", 1, 1, 1)), b"\x10" + b"\x00" * 7])
    )
    if data.draw(st.booleans()):
        message = data.draw(st.binary(max_size=200))
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(message) - 1))
            message = message[:place] + data.draw(st.binary(max_size=3)) + message[place + 1 :]
            message = message or b"\x00"
    try:
        DECODERS[name](message, tmp_path)
    except EdgeError:
        return


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r", "\u2028", "\x00"])
def test_names_end_where_they_end(end: str) -> None:
    """A name, digest or key with a line feed behind it is none."""

    def message(**changed: Any) -> bytes:
        whole = {"token": "t" * 16, "device_name": "a", "device_class": "c", "public_key": "A" * 43 + "="}
        return msgspec.json.encode({**whole, **changed})

    decode(message(), EnrolRequest)
    for field, value in (("device_name", "a"), ("device_class", "c"), ("public_key", "A" * 43 + "=")):
        with pytest.raises(EdgeError, match=field):
            decode(message(**{field: value + end}), EnrolRequest)
