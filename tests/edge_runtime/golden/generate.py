"""Record one example of each wire message, as this version encodes it.

    python -m tests.edge_runtime.golden.generate

writes ``<version>/<Message>.json`` or ``.msgpack`` for messages that have no recording yet. Files of a
released version are never rewritten: their bytes must decode forever.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_runtime.protocol.messages import (
    CheckInRequest,
    ComeBack,
    DeviceEvent,
    EnrolRequest,
    EnrolResponse,
    LocalOptimizer,
    MaskingKeys,
    MaskingOver,
    MaskingWait,
    MemoryReport,
    NotEligible,
    Peer,
    Protection,
    Refusal,
    Release,
    Result,
    ResultReceipt,
    RevealedShare,
    RevealedShares,
    SealedShare,
    SealedShares,
    SendMasked,
    ShareSecrets,
    SignedRelease,
    SignedTask,
    Standing,
    Task,
    Unmask,
    UploadStanding,
    encode,
    encode_result,
)

FOLDER = Path(__file__).parent / "v1"
SHA256 = "0123456789abcdef" * 4
KEY = "A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="
SIGNATURE = "A" * 86 + "=="

MEMORY = MemoryReport(
    predicted_peak_bytes=200_000_000,
    high_water_bytes=190_000_000,
    cap_bytes=256_000_000,
    cgroup_peak_bytes=195_000_000,
    anonymous_bytes=120_000_000,
    file_bytes=60_000_000,
    floor_bytes=70_000_000,
    phases={"load": 90_000_000, "step": 190_000_000},
    enforced_by="cgroup_v1",
)
TASK = Task(
    task_id="t-1",
    run_id="r-1",
    round=3,
    slot=2,
    seed=(1 << 63) - 1,
    package=SHA256,
    package_signature=SIGNATURE,
    state=SHA256,
    slices=("block0.query", "block1.query"),
    train_head=True,
    steps=10,
    batch_size=8,
    draws=4,
    sequence_limit=128,
    optimizer=LocalOptimizer("sgd", 0.5, 0.25),
    required_bytes=210_000_000,
    deadline_s=600.0,
    directions="orthogonal",
)
#: Every field that was added since, with a value other than its default.
FULL_TASK = msgspec.structs.replace(
    TASK,
    directions="filtered",
    loss="phuber",
    update="zero_order",
    report="scalars",
    phuber_tau=2.5,
    head="perturbed",
    epochs=2,
    freeze_a=True,
    difference="forward",
    difference_step=0.01,
    candidates=10,
    reference=SHA256[::-1],
    jvp_limit=100.0,
    features=(0, 2),
    pooling="max",
    sums_dtype="float16",
    rank_mode="dynamic_frozen",
    exits=(1, 2),
    rank=3,
    sums_projection=1024,
    sketch_size=70,
    sketch_entries=10,
    handed_in=(SHA256, SHA256[::-1]),
    protection=Protection(1.5, 0.25, 32, 1e-6, 1000),
)
RELEASE = Release(
    number=7,
    run_id="r-1",
    round=3,
    package=SHA256,
    package_signature=SIGNATURE,
    values=SHA256[::-1],
    sequence_limit=128,
    lowest_accuracy=0.75,
    highest_loss=1.5,
    features=(0, 2),
    pooling="mean",
)
MASKING_KEYS = MaskingKeys(KEY, KEY, SIGNATURE)
SIGNED_RELEASE = SignedRelease(encode(RELEASE).decode(), SIGNATURE)
MESSAGES: tuple[msgspec.Struct, ...] = (
    EnrolRequest("one-time-token-0001", "board-1", "generic", KEY),
    EnrolResponse("d-1", KEY),
    CheckInRequest(
        "0.1.0",
        256_000_000,
        70_000_000,
        1000,
        setup=SHA256[:32],
        trains=False,
        release=7,
        not_eligible="too_hot",
        protects=True,
    ),
    TASK,
    SignedTask(encode(TASK).decode(), SIGNATURE),
    RELEASE,
    SIGNED_RELEASE,
    ComeBack(10.0, 20.5, "no round is open", SIGNED_RELEASE),
    NotEligible("too_small", "the cap is under what any assignment needs", release=SIGNED_RELEASE),
    Result(
        "t-1",
        "r-1",
        3,
        80,
        10,
        0,
        0.625,
        42.5,
        MEMORY,
        SHA256,
        b"\x00\x01\xff",
        "forward",
        4,
        (SHA256,),
        (b"\x02",),
        MASKING_KEYS,
    ),
    ResultReceipt("counted"),
    Standing(60.0, wanted=False),
    SealedShares((SealedShare(2, b"\x03" * 82),)),
    RevealedShares((RevealedShare(2, b"\x04" * 33),)),
    MaskingWait(2.5),
    ShareSecrets(2, (Peer(2, "t-2", KEY, MASKING_KEYS),)),
    SendMasked((SealedShare(1, b"\x03" * 82),)),
    Unmask((0, 2), (1,)),
    MaskingOver("the round is over"),
    UploadStanding(262_144, counted=True),
    DeviceEvent("task_failed", "SignatureError: not signed by the key", "t-1", lasting=True),
    Refusal("stale", "the round is over"),
)


def recording(message: msgspec.Struct) -> tuple[str, bytes]:
    """File name and bytes of a message's recording."""
    name = type(message).__name__
    if isinstance(message, Result):
        return f"{name}.msgpack", encode_result(message)
    return f"{name}.json", encode(message)


def main() -> None:
    """Write what is not recorded yet."""
    FOLDER.mkdir(exist_ok=True)
    for message in MESSAGES:
        name, data = recording(message)
        if not (FOLDER / name).exists():
            (FOLDER / name).write_bytes(data)
            print(FOLDER / name)
    full = FOLDER / "Task-every-field.json"
    if not full.exists():
        full.write_bytes(encode(FULL_TASK))
        print(full)


if __name__ == "__main__":
    main()
