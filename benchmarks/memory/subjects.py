"""What the memory benches run: packages of several model shapes, prepared for this machine, and jobs on them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.harness.long_rows import LABELS, write_full_rows
from benchmarks.harness.measured_process import python_program
from benchmarks.harness.minilm import packaged_model
from benchmarks.harness.shapes import BERT_BASE, BERT_LARGE, LLAMA_1B, write_decoder, write_shape
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.manifest import MANIFEST, Arithmetic, Manifest
from edge_runtime.package.package import Package
from edge_runtime.protocol.messages import LocalOptimizer, Task, Update
from edge_runtime.protocol.signing import generate_key
from edge_runtime.worker.jobs import PrepareJob, StepMeasure, TrainJob
from edge_runtime.worker.process import ensure_prepared

MINILM = "MiniLM"
TOKENS, ROWS = 128, 64
#: Cap of a job where a bench measures memory and does not limit it.
AMPLE_BYTES = 4 << 30
TASK_ID = "benchmark"
ACCUMULATE = LocalOptimizer("accumulate", slice_rate=1e-3, head_rate=1e-3)


@dataclass(frozen=True)
class Subject:
    """One model with its package.

    Attributes:
        name: what tables call it.
        model: Hugging Face folder.
        package: folder of the package.
        sha256: digest of the package's manifest.
        manifest: manifest of the package.
        rows: JSONL file of rows that fill the sequences.
        threads: threads that its jobs run on.
    """

    name: str
    model: Path
    package: Path
    sha256: str
    manifest: Manifest
    rows: Path
    threads: int

    @property
    def slices(self) -> tuple[str, ...]:
        """All slices but the head."""
        return tuple(spec.name for spec in self.manifest.slices if spec.kind != "head")

    def prepared(self, arithmetic: Arithmetic | None = None, cap_bytes: int = AMPLE_BYTES) -> Path:
        """The package prepared for this machine under a cap, in a given arithmetic or in the best one here."""
        folder = self.package.with_name(f"{self.package.name}-{arithmetic or 'prepared'}")
        ensure_prepared(
            PrepareJob(str(self.package), self.sha256, str(folder), cap_bytes, self.threads, arithmetic)
        )
        return folder

    def job(
        self,
        choice: ExecutionChoice | None,
        *,
        draws: int = 1,
        steps: int = 3,
        batch_size: int = 8,
        sequence: int = TOKENS,
        slices: tuple[str, ...] | None = None,
        cap_bytes: int = AMPLE_BYTES,
        arithmetic: Arithmetic | None = None,
        prefix_cache_bytes: int = 0,
        update: Update = "forward",
        optimizer: LocalOptimizer = ACCUMULATE,
    ) -> TrainJob:
        """A task that trains slices (all by default) and the head, on the package prepared for this machine."""
        task = Task(
            task_id=TASK_ID,
            run_id=TASK_ID,
            round=0,
            slot=0,
            seed=0,
            package=self.sha256,
            package_signature="A" * 86 + "==",
            state="0" * 64,
            slices=self.slices if slices is None else slices,
            train_head=self.manifest.head is not None,
            steps=steps,
            batch_size=batch_size,
            draws=draws,
            sequence_limit=sequence,
            optimizer=optimizer,
            required_bytes=0,
            deadline_s=0.0,
            update=update,
        )
        return TrainJob(
            package_folder=str(self.package),
            package_sha256=self.sha256,
            prepared_folder=str(self.prepared(arithmetic)),
            state_path=str(self.package / self.manifest.initial_state),
            data_path=str(self.rows),
            delta_path=str(self.package.with_name(f"change-{os.getpid()}.safetensors")),
            task=task,
            cap_bytes=cap_bytes,
            threads=self.threads,
            choice=choice,
            prefix_cache_bytes=prefix_cache_bytes,
        )


def step_seconds(steps: Sequence[StepMeasure], warm_up: int = 1) -> float:
    """Median seconds of a worker's steps.

    Args:
        steps: all steps of the worker; each tells its end.
        warm_up: number of first steps that do not count, at least 1, since nothing tells when the first began.
    """
    ends = [step.end_s for step in steps[warm_up - 1 :]]
    return median(after - before for before, after in pairwise(ends))


def make_subjects(
    folder: Path, threads: int, names: tuple[str, ...], *, with_adjoint: bool = False
) -> dict[str, Subject]:
    """Make models, packages and rows.

    Args:
        folder: folder for all of them; packages that it has already are taken as they are.
        threads: threads that jobs run on.
        names: names of the models.
        with_adjoint: whether packages have the programs of backpropagation too; such packages need another folder.
    """
    minilm = packaged_model()
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    write_full_rows(rows, minilm / "tokenizer.json", TOKENS, ROWS)
    models = {
        MINILM: lambda: minilm,
        BERT_BASE.name: lambda: write_shape(folder / "bert-base", BERT_BASE, minilm),
        BERT_LARGE.name: lambda: write_shape(folder / "bert-large", BERT_LARGE, minilm),
        LLAMA_1B.name: lambda: write_decoder(folder / "llama-1b", LLAMA_1B, minilm),
    }
    extra = ("--with-adjoint",) if with_adjoint else ()
    made = {}
    for name in names:
        if name == LLAMA_1B.name:
            data, task = without_labels(rows), ("--task", "causal_lm")
        else:
            data, task = rows, ("--labels", str(LABELS))
        made[name] = _subject(folder, name, models[name](), data, threads, (*task, *extra))
    return made


def without_labels(rows: Path) -> Path:
    """Write the texts of rows without labels, for language modelling, to a file beside them; returns that file."""
    path = rows.with_name("texts.jsonl")
    texts = [json.loads(line)["text"] for line in rows.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def _subject(
    folder: Path, name: str, model: Path, rows: Path, threads: int, options: tuple[str, ...]
) -> Subject:
    package = folder / f"{name}.package"
    if not (package / MANIFEST).exists():
        print(f"Exporting {name}", flush=True)
        options = ("--sequence-limit", str(TOKENS), *options)
        subprocess.run(
            export_command(folder, model, rows, package, options), check=True, stdout=subprocess.DEVNULL
        )
    return opened(name, model, package, rows, threads)


def export_command(
    folder: Path, model: Path, rows: Path, package: Path, options: tuple[str, ...]
) -> list[str]:
    """The command that exports a model, signed with the folder's key; the key is made if there is none."""
    key = folder / "publisher.key"
    if not key.exists():
        generate_key().save(key)
    command = python_program("export.cli", "package", model, "--check-data", rows, "--output", package)
    return [*command, "--key", str(key), *options]


def opened(name: str, model: Path, package: Path, rows: Path, threads: int) -> Subject:
    """The subject of a package that is there already."""
    sha256 = hashlib.sha256((package / MANIFEST).read_bytes()).hexdigest()
    return Subject(name, model, package, sha256, Package.open_known(package, sha256).manifest, rows, threads)
