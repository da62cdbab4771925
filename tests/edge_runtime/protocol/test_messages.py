import inspect

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ProtocolError
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    MAX_CONTROL_BYTES,
    CheckInRequest,
    CheckInResponse,
    ComeBack,
    DeviceEvent,
    NotEligible,
    Result,
    SignedTask,
    Task,
    decode,
    decode_result,
    encode,
    encode_result,
)
from tests.edge_runtime.golden.generate import (
    FOLDER,
    FULL_TASK,
    MASKING_KEYS,
    MESSAGES,
    SHA256,
    TASK,
    recording,
)

IDS = [type(message).__name__ for message in MESSAGES]
#: Parts of other messages, recorded inside them, and the base of a task.
PARTS = {
    "LocalOptimizer",
    "MaskingKeys",
    "MemoryReport",
    "Peer",
    "Protection",
    "RevealedShare",
    "SealedShare",
    "TrainingSettings",
}


@pytest.mark.parametrize("message", MESSAGES, ids=IDS)
def test_recorded_bytes_decode_and_encode_again(message: msgspec.Struct) -> None:
    """Recorded bytes decode to the message they were made from, and it encodes to the same bytes."""
    name, encoded = recording(message)
    recorded = (FOLDER / name).read_bytes()
    decoded = decode_result(recorded) if isinstance(message, Result) else decode(recorded, type(message))
    assert decoded == message
    assert encoded == recorded


def test_a_result_from_before_judges_still_decodes() -> None:
    """A memory report recorded without ``enforced_by`` decodes to an empty one, and to the same figures."""
    old = decode_result((FOLDER / "Result-without-judge.msgpack").read_bytes())
    new = decode_result((FOLDER / "Result.msgpack").read_bytes())
    assert old.memory.enforced_by == ""
    assert msgspec.structs.replace(old.memory, enforced_by=new.memory.enforced_by) == new.memory


def test_a_result_from_before_estimators_still_decodes() -> None:
    """A result recorded without ``update`` and ``draws`` tells of no estimator, and else the same."""
    old = decode_result((FOLDER / "Result-without-estimator.msgpack").read_bytes())
    new = decode_result((FOLDER / "Result.msgpack").read_bytes())
    assert (old.update, old.draws) == (None, 0)
    more = {name: getattr(new, name) for name in ("update", "draws", "kept", "removed", "masking")}
    assert msgspec.structs.replace(old, **more) == new


def test_a_result_from_before_sums_were_gone_on_from_still_decodes() -> None:
    """A result recorded without ``kept`` and ``removed`` tells of no sums from before, and else the same."""
    old = decode_result((FOLDER / "Result-without-kept.msgpack").read_bytes())
    new = decode_result((FOLDER / "Result.msgpack").read_bytes())
    assert (old.kept, old.removed) == ((), ())
    assert msgspec.structs.replace(old, kept=new.kept, removed=new.removed, masking=new.masking) == new


def test_messages_from_before_protection_still_decode() -> None:
    """A result recorded without ``masking`` brings no keys; a check-in without ``protects`` is of one that cannot."""
    result = decode_result((FOLDER / "Result-without-masking.msgpack").read_bytes())
    assert result.masking is None
    assert msgspec.structs.replace(result, masking=MASKING_KEYS) == decode_result(
        (FOLDER / "Result.msgpack").read_bytes()
    )
    old = decode((FOLDER / "CheckInRequest-without-protects.json").read_bytes(), CheckInRequest)
    assert not old.protects
    assert msgspec.structs.replace(old, protects=True) == decode(
        (FOLDER / "CheckInRequest.json").read_bytes(), CheckInRequest
    )


def test_messages_from_before_set_asides_still_decode() -> None:
    """A check-in recorded without ``setup`` tells none, and an event without ``lasting`` is of what may pass."""
    old = decode((FOLDER / "CheckInRequest-without-setup.json").read_bytes(), CheckInRequest)
    assert old == CheckInRequest("0.1.0", 256_000_000, 70_000_000, 1000)
    assert old.setup == ""
    event = decode((FOLDER / "DeviceEvent-without-lasting.json").read_bytes(), DeviceEvent)
    assert event == DeviceEvent("task_failed", "WorkerError: killed by SIGKILL", "t-1")
    assert not event.lasting


def test_messages_from_before_releases_still_decode() -> None:
    """A check-in recorded without ``trains`` is of one that trains; answers without ``release`` tell of none."""
    old = decode((FOLDER / "CheckInRequest-without-release.json").read_bytes(), CheckInRequest)
    assert old == CheckInRequest("0.1.0", 256_000_000, 70_000_000, 1000, setup=SHA256[:32])
    assert old.trains
    assert old.release == 0
    for kind in (ComeBack, NotEligible):
        answer = decode((FOLDER / f"{kind.__name__}-without-release.json").read_bytes(), CheckInResponse)
        assert isinstance(answer, kind)
        assert answer.release is None


def test_a_check_in_from_before_eligibility_still_decodes() -> None:
    """One recorded without ``not_eligible`` is of a device that may work; the field is a code, bounded."""
    old = decode((FOLDER / "CheckInRequest-without-eligibility.json").read_bytes(), CheckInRequest)
    new = decode((FOLDER / "CheckInRequest.json").read_bytes(), CheckInRequest)
    assert (old.not_eligible, new.not_eligible) == ("", "too_hot")
    assert msgspec.structs.replace(old, not_eligible="too_hot", protects=True) == new
    for value in ("Too hot", "x" * 65, "too_hot\n"):
        with pytest.raises(ProtocolError, match=r"\$\.not_eligible"):
            decode(encode(msgspec.structs.replace(new, not_eligible=value)), CheckInRequest)


@pytest.mark.parametrize("missing", ["update", "report", "features", "rank", "sketch", "protection"])
def test_a_task_from_before_a_field_still_decodes(missing: str) -> None:
    """A task recorded before a field, or before several that came together, asks for what it always did."""
    assert decode((FOLDER / f"Task-without-{missing}.json").read_bytes(), Task) == TASK
    signed = decode((FOLDER / f"SignedTask-without-{missing}.json").read_bytes(), SignedTask)
    assert decode(signed.task.encode(), Task) == TASK
    assert (TASK.update, TASK.report, TASK.head, TASK.loss) == (
        "forward",
        "weights",
        "exact",
        "cross_entropy",
    )


def test_every_field_of_a_task_is_recorded() -> None:
    """A recording with no field at its default decodes and encodes to the same bytes."""
    recorded = (FOLDER / "Task-every-field.json").read_bytes()
    assert decode(recorded, Task) == FULL_TASK
    assert encode(FULL_TASK) == recorded
    fields = zip(Task.__struct_fields__[::-1], Task.__struct_defaults__[::-1], strict=False)
    assert all(getattr(FULL_TASK, name) != default for name, default in fields)


def test_every_message_is_recorded() -> None:
    """A message without a recording would be free to change under released devices."""
    structs = {
        name
        for name, value in vars(messages).items()
        if inspect.isclass(value) and issubclass(value, msgspec.Struct) and value is not msgspec.Struct
    }
    assert structs == set(IDS) | PARTS


def test_every_message_is_frozen() -> None:
    """What was decoded and checked cannot be changed afterwards."""
    assert all(type(message).__struct_config__.frozen for message in MESSAGES)


@pytest.mark.parametrize("name", ["SignedTask", "ComeBack", "NotEligible"])
def test_answers_to_a_check_in_are_told_apart(name: str) -> None:
    """The answer's tag decides which message it is."""
    decoded = decode((FOLDER / f"{name}.json").read_bytes(), CheckInResponse)
    assert type(decoded).__name__ == name


def test_fields_of_a_later_version_are_ignored() -> None:
    """A device reads a newer coordinator's message, since fields are only ever added."""
    table = {**msgspec.to_builtins(TASK), "brand_new": [1, 2]}
    assert decode(msgspec.json.encode(table), Task) == TASK


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task_id", "../../etc"),
        ("task_id", ""),
        ("slices", ["a b"]),
        ("seed", 1 << 63),
        ("seed", -1),
        ("steps", 0),
        ("batch_size", 1 << 40),
        ("required_bytes", (1 << 50) + 1),
        ("package", "A" * 64),
        ("package_signature", "short"),
        ("deadline_s", -1.0),
        ("directions", "sideways"),
        ("tau", 1.0),
        ("candidates", 1001),
        ("jvp_limit", 0.0),
        ("reference", "A" * 64),
        ("features", [-1]),
        ("features", list(range(257))),
        ("pooling", "median"),
        ("sums_dtype", "int8"),
        ("rank_mode", "sorted"),
        ("rank", -1),
        ("round", 1.5),
        ("protection", {"masked_bits": 16}),
        ("protection", {"noise_std": -1.0}),
        ("protection", {"clip_norm": 0.0}),
        ("protection", {"quantum": 0.0}),
        ("protection", {"largest": 0}),
        ("protection", {"unknown": 1}),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(field: str, value: object) -> None:
    """A value out of its bounds is a ProtocolError that names the field."""
    table = {**msgspec.to_builtins(TASK), field: value}
    with pytest.raises(ProtocolError, match=rf"malformed Task.*\$\.{field}"):
        decode(msgspec.json.encode(table), Task)


def test_huge_messages_are_not_parsed() -> None:
    """The size is checked first, and both figures are stated."""
    with pytest.raises(ProtocolError, match=str(MAX_CONTROL_BYTES)):
        decode(b" " * (MAX_CONTROL_BYTES + 1), Task)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise_anything_else(data: bytes) -> None:
    """Whatever arrives, decoding ends in a ProtocolError."""
    with pytest.raises(ProtocolError):
        decode(data, Task)
    with pytest.raises(ProtocolError):
        decode_result(data)


@given(
    cap=st.integers(0, 1 << 50),
    floor=st.integers(0, 1 << 50),
    count=st.integers(0, 1 << 40),
    text=st.text(max_size=50),
)
def test_any_message_within_bounds_survives_the_wire(cap: int, floor: int, count: int, text: str) -> None:
    """Encoding and decoding is the identity on all that the bounds allow."""
    message = CheckInRequest(text, cap, floor, count)
    assert decode(encode(message), CheckInRequest) == message


@given(st.binary(max_size=500), st.none() | st.floats(allow_nan=False))
def test_any_change_survives_the_wire(change: bytes, loss: float | None) -> None:
    """Results carry their bytes and losses through MessagePack unchanged."""
    (recorded,) = (message for message in MESSAGES if isinstance(message, Result))
    result = msgspec.structs.replace(recorded, change=change, mean_loss=loss)
    assert decode_result(encode_result(result)) == result
