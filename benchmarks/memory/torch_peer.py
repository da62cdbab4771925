"""A LoRA step of PyTorch as a fresh measured process: what one would run instead of the runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median

from benchmarks.harness.long_rows import LABELS
from benchmarks.harness.measured_process import Measured, python_program, run_measured
from benchmarks.memory.subjects import TOKENS, Subject


@dataclass(frozen=True)
class TorchSteps:
    """What the steps took.

    Attributes:
        measured: the finished process.
        resident_bytes: peak of resident memory (VmHWM), the process and its children together.
        step_s: median over the timed steps, in seconds.
    """

    measured: Measured
    resident_bytes: int
    step_s: float


def run_torch_steps(
    subject: Subject,
    *,
    batch_size: int,
    micro_batch: int,
    checkpointing: bool,
    warm_up_steps: int,
    steps: int,
) -> TorchSteps:
    """Fine-tune the subject's model by Transformers and peft, on the subject's own rows and threads.

    Args:
        subject: encoder to fine-tune.
        batch_size: rows of a step.
        micro_batch: rows that are run at a time.
        checkpointing: whether activations are computed again on the way back (gradient checkpointing).
        warm_up_steps: steps that are not timed, before those that are.
        steps: steps that are timed.
    """
    settings = {
        "model": str(subject.model),
        "labels": str(LABELS),
        "rows": str(subject.rows),
        "tokens": TOKENS,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "steps": warm_up_steps + steps,
        "threads": subject.threads,
        "checkpointing": checkpointing,
    }
    measured = run_measured(python_program("benchmarks.memory.torch_step"), json.dumps(settings).encode())
    done = json.loads(measured.output)
    resident_bytes = done["high_water_bytes"] + measured.children_peak_bytes
    return TorchSteps(measured, resident_bytes, median(done["seconds"][warm_up_steps:]))
