"""A memory report such as a small board would write: sizes in bytes, times in seconds."""

from __future__ import annotations

from msgspec.structs import replace

from edge_runtime.profile.document import (
    Bin,
    Comparison,
    Edge,
    Growth,
    LiveTensor,
    Measuring,
    PhasePeak,
    Profile,
    ProfileIdentity,
    TimelineSample,
    WhatIf,
    WorkRecord,
    WorstCase,
)

MIB = 1 << 20


def mib(count: float) -> int:
    """Bytes of so many MiB."""
    return int(count * MIB)


IDENTITY = ProfileIdentity(
    device="raspberry-pi-4",
    kernel="Linux 6.6.31 aarch64",
    cpu="Cortex-A72, 4 cores",
    page_size_bytes=4096,
    memory_bytes=mib(3792.5),
    runtime_version="0.1.0",
    engine="ONNX Runtime 1.31.1",
    package_name="minilm-banking77",
    package_sha256="9c41d6f0" * 8,
    arithmetic="int8 per row",
    command=(
        "edge-runtime profile --package packages/minilm-banking77 --cap 128M --batch-size 8 --sequence 128 "
        "--draws 1 --steps 8 --data examples/banking77/dev.jsonl --output report"
    ),
)
WORK = WorkRecord(
    batch_size=8,
    micro_batch=2,
    sequence=128,
    draws=1,
    slices=("block4.query", "block4.value", "block5.query", "block5.value", "head"),
    weights="resident",
    steps=8,
    threads=2,
    gave_up=("micro-batch 4 → 2",),
)
BINS = (
    Bin("libraries", mib(38.0), mib(37.2), "interpreter, numpy, safetensors"),
    Bin("tokenizer", mib(11.9), mib(11.2), "vocabulary of 30,522"),
    Bin("engine", mib(17.0), mib(16.1), "operator registries and code pages"),
    Bin("weights (file-backed)", mib(18.6), mib(17.8), "packed int8 of six blocks"),
    Bin("live tensors", mib(9.4), mib(9.9), "largest live set, one block"),
    Bin("waiting values", mib(3.6), mib(3.5), "between segments"),
    Bin("slices", 2560, None, "too small to tell apart"),
    Bin("data", 0, mib(0.4), "rows of the step; not predicted"),
)
_COURSE = (
    # phase, from, until, first and last of anonymous, first and last of file-backed memory
    ("start", 0.0, 0.62, (3.0, 22.0), (6.0, 25.4)),
    ("load", 0.62, 1.9, (22.0, 39.0), (25.4, 45.8)),
    ("step", 1.9, 4.9, (39.0, 40.5), (45.8, 47.2)),
    ("serialise", 4.9, 5.1, (38.0, 38.4), (47.2, 47.2)),
    ("upload", 5.1, 5.6, (36.2, 36.4), (47.2, 47.4)),
)


def timeline() -> tuple[TimelineSample, ...]:
    """A sample every 10 ms; each of eight steps breathes once."""
    samples = []
    for phase, since, until, anonymous, file in _COURSE:
        count = round((until - since) * 100)
        for index in range(count):
            done = index / count
            breath = 9.2 * (done * 8 % 1) ** 2 if phase == "step" else 0.0
            parts = (
                mib(anonymous[0] + (anonymous[1] - anonymous[0]) * done + breath),
                mib(file[0] + (file[1] - file[0]) * done),
            )
            samples.append(TimelineSample(since + index / 100, phase, sum(parts), *parts))
    return tuple(samples)


def what_if() -> tuple[WhatIf, ...]:
    """Sizes around the one that was run."""
    rows = (
        (8, 4, 128, 1, 5, 107.9, 0.93, False),
        (8, 2, 128, 1, 5, 98.5, 0.96, True),
        (8, 1, 128, 1, 5, 93.4, 1.03, False),
        (8, 2, 128, 4, 5, 121.7, 2.21, False),
        (8, 4, 256, 4, 5, 187.2, 4.87, False),
        (16, 2, 128, 1, 5, 101.6, 1.92, False),
        (8, 2, 64, 1, 2, 91.0, 0.44, False),
    )
    return tuple(
        WhatIf(batch, micro, tokens, draws, slices, "resident", mib(peak), step, peak <= 128, chosen)
        for batch, micro, tokens, draws, slices, peak, step, chosen in rows
    )


def edges() -> tuple[Edge, ...]:
    """How far batch and draws go under the cap; the tokens go as far as the package."""
    chosen = next(option for option in what_if() if option.chosen)

    def option(peak: float, **changed: int) -> WhatIf:
        return replace(chosen, chosen=False, predicted_peak_bytes=mib(peak), fits=peak <= 121.6, **changed)

    return (
        Edge("batch_size", option(119.9, batch_size=64), option(131.0, batch_size=128), 4096),
        Edge("sequence", option(98.5), None, 128),
        Edge("draws", option(108.0, draws=2), option(121.7, draws=4), 1024),
    )


PROFILE = Profile(
    created="2026-11-20T09:14:07Z",
    identity=IDENTITY,
    work=WORK,
    cap_bytes=mib(128),
    peak_bytes=mib(97.3),
    charged_peak_bytes=mib(84.1),
    enforced_by="cgroup_v2",
    enforcement_note="Swap was not allowed.",
    predicted_peak_bytes=sum(bin_.predicted_bytes for bin_ in BINS),
    bins=BINS,
    timeline=timeline(),
    phases=(
        PhasePeak("start", mib(47.4), 0.62),
        PhasePeak("load", mib(86.0), 1.28),
        PhasePeak("step", mib(97.3), 3.0),
        PhasePeak("serialise", mib(86.1), 0.2),
        PhasePeak("upload", mib(84.2), 0.5),
    ),
    tensors=(
        LiveTensor(
            "gelu_3", "block4.dual", "Gelu", "2 × 128 × 1536", mib(1.5), "an activation function's output"
        ),
        LiveTensor(
            "mul_7",
            "block4.dual",
            "Mul",
            "2 × 128 × 1536",
            mib(1.5),
            "tangents of values between two layers",
        ),
        LiveTensor("block4/attention/probs", "block4.dual", "Softmax", "2 × 12 × 128 × 128", mib(1.5)),
        LiveTensor("block4/attention/probs_dot", "block4.dual", "Mul", "2 × 12 × 128 × 128", mib(1.5)),
        LiveTensor("block4/hidden", "block4.dual", "LayerNormalization", "2 × 128 × 384", mib(0.375)),
    ),
    what_if=what_if(),
    growth=Growth(100, mib(40.4), mib(40.41), 102.4, 1024.0),
    comparisons=(
        Comparison("this task", mib(97.3), 0.96, "measured above"),
        Comparison("inference alone", mib(88.0), 0.45, "same batch, no tangents"),
        Comparison("backpropagation (PyTorch)", mib(512.6), 1.12, "LoRA, on a workstation of the same speed"),
    ),
    step_s=0.96,
    measuring=Measuring(560, 0.041, "Each sample reads /proc/PID/smaps_rollup from outside the worker."),
    worst_case=WorstCase(8, 128, mib(98.5), True, (), mib(88), mib(104)),
    edges=edges(),
)

#: Measured on short rows, as most data has them; the task's own limits need a larger cap.
SHORT_ROWS = replace(
    PROFILE,
    work=replace(WORK, sequence=24),
    worst_case=WorstCase(8, 128, mib(126.3), False, (), mib(133), mib(136)),
)

#: Everything that can go wrong, at once: killed over the cap, leaking, and badly explained.
FAILED = replace(
    PROFILE,
    created="2026-11-21T09:14:07Z",
    peak_bytes=mib(131.4),
    charged_peak_bytes=mib(128),
    enforced_by="cgroup_v1",
    enforcement_note="",
    killed=True,
    growth=Growth(100, mib(40.4), mib(44.9), 47185.9, 1024.0),
    phases=(*PROFILE.phases[:2], PhasePeak("step", mib(131.4), 3.0)),
    comparisons=PROFILE.comparisons[1:],
    step_s=None,
)
