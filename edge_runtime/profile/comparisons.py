"""Other ways to do a profiled task's work: inference alone, and backpropagation where torch is installed.

Each runs in a process of its own. A way that is not to be had here is left out, and a note says why, or how to get it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from itertools import islice
from pathlib import Path

import msgspec
from msgspec import Struct

from edge_runtime.data.rows import count_rows
from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import EdgeError
from edge_runtime.profile.document import Comparison
from edge_runtime.protocol.messages import Bytes, Seconds
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome, TrainJob
from edge_runtime.worker.process import run_worker

#: Number of rows that inference alone runs over: enough to time it, and few enough of a large data file.
MOST_COMPARED_ROWS = 1024
BACKPROPAGATION = "export.torch_baseline"
BACKPROPAGATION_STEPS, BACKPROPAGATION_TIMEOUT_S = 6, 900.0
_MOST_REASON_CHARACTERS = 300


class BackpropagationSettings(Struct, frozen=True):
    """Settings of the child process, which takes steps on the very batches of the task.

    Attributes:
        model: path of the Hugging Face folder.
        package_folder: path of the package folder.
        package_sha256: digest that names the package.
        data_path: path of the data file.
        slices: names of the slices that are trained beside the head.
        sequence: largest number of tokens of a row.
        batch_size: number of rows of a step.
        steps: number of steps.
        seed: seed of the task.
        threads: number of threads of torch.
    """

    model: str
    package_folder: str
    package_sha256: str
    data_path: str
    slices: tuple[str, ...]
    sequence: int
    batch_size: int
    steps: int
    seed: int
    threads: int


class BackpropagationOutcome(Struct, frozen=True):
    """Measurements of the child process.

    Attributes:
        high_water_bytes: its high-water mark.
        step_s: median seconds of its steps after the first.
    """

    high_water_bytes: Bytes
    step_s: Seconds


def inference_alone(job: TrainJob, folder: Path) -> tuple[Comparison | None, str]:
    """The primal programs over the same rows under the same cap; and a note.

    Args:
        job: job of the profiled task.
        folder: folder for a shortened copy of a large data file.
    """
    rows = count_rows(Path(job.data_path))
    data = Path(job.data_path)
    if rows > MOST_COMPARED_ROWS:
        data = folder / "compared.jsonl"
        with Path(job.data_path).open("rb") as source, data.open("wb") as target:
            target.writelines(islice(source, MOST_COMPARED_ROWS))
    evaluation = EvaluateJob(
        package_folder=job.package_folder,
        package_sha256=job.package_sha256,
        prepared_folder=job.prepared_folder,
        state_path=job.state_path,
        data_path=str(data),
        sequence_limit=job.task.sequence_limit,
        cap_bytes=job.cap_bytes,
        threads=job.threads,
        engine=job.engine,
    )
    try:
        outcome = run_worker(evaluation, EvaluateOutcome)
    except EdgeError as error:
        return None, f"Inference alone is not compared: {_reason(error)}"
    note = f"{outcome.rows} rows, the engine and weights the same, no tangents"
    return Comparison(
        "inference alone", outcome.memory.high_water_bytes, _batch_seconds(outcome, job.task.batch_size), note
    ), ""


def backpropagation(job: TrainJob, model: Path | None) -> tuple[Comparison | None, str]:
    """A few AdamW steps of PyTorch on the same batches, without a cap; and a note.

    Args:
        job: job of the profiled task.
        model: path of the Hugging Face folder that the package was made from; None compares nothing.
    """
    if model is None or importlib.util.find_spec("torch") is None:
        return None, (
            "Backpropagation is not compared: give --model FOLDER, the Hugging Face folder the package was made from, "
            "where edge-runtime[export] is installed."
        )
    settings = BackpropagationSettings(
        model=str(model.resolve()),
        package_folder=job.package_folder,
        package_sha256=job.package_sha256,
        data_path=job.data_path,
        slices=job.task.slices,
        sequence=job.task.sequence_limit,
        batch_size=job.task.batch_size,
        steps=BACKPROPAGATION_STEPS,
        seed=job.task.seed,
        threads=job.threads,
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", BACKPROPAGATION],
            input=msgspec.json.encode(settings),
            capture_output=True,
            timeout=BACKPROPAGATION_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
            return None, f"Backpropagation is not compared: {_reason(words[-1])}"
        answer = msgspec.json.decode(done.stdout, type=BackpropagationOutcome)
    except (subprocess.TimeoutExpired, *MALFORMED) as error:
        return None, f"Backpropagation is not compared: {_reason(error)}"
    note = f"AdamW on the same {len(job.task.slices)} slices and head, float32, no cap"
    return Comparison("backpropagation (PyTorch)", answer.high_water_bytes, answer.step_s, note), ""


def _batch_seconds(outcome: EvaluateOutcome, batch_size: int) -> float | None:
    """Seconds for as many rows as a step has, the first group of rows left out."""
    steps = outcome.steps
    if len(steps) < 2:
        return None
    rows = outcome.rows * (len(steps) - 1) / len(steps)
    return max(0.0, steps[-1].end_s - steps[0].end_s) * batch_size / rows


def _reason(error: object) -> str:
    text = "".join(c for c in " ".join(str(error).split()) if c.isprintable())
    return text[:_MOST_REASON_CHARACTERS]
