"""The worker as a real process, on a real package."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from edge_runtime.agent.decisions import build_result
from edge_runtime.data.batches import Tokenizer, draw_batches, load_rows, make_batch
from edge_runtime.errors import (
    CapExceededError,
    DataError,
    DigestError,
    PackageError,
    PreparationError,
    SliceError,
    WorkerError,
)
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.memory.sampler import Sampler
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage, is_current
from edge_runtime.package.slices import decode_values, encode_values
from edge_runtime.protocol.messages import LocalOptimizer, decode_result
from edge_runtime.training.gradient import estimate
from edge_runtime.training.replay import decode_report, replay
from edge_runtime.training.tangents import draw_tangents
from edge_runtime.worker.jobs import (
    EvaluateOutcome,
    Failure,
    PrepareJob,
    PrepareOutcome,
    TrainJob,
    TrainOutcome,
)
from edge_runtime.worker.process import (
    FAILURE_EXIT_CODE,
    ensure_prepared,
    finish_worker,
    run_worker,
    start_worker,
)
from tests.edge_runtime.jobs import evaluation_before
from tests.edge_runtime.local import write_labelled_rows
from tests.export import tiny

MIB = 1 << 20
QUERY = "encoder.layer.1.attention.self.query"


@pytest.fixture
def values(exported) -> dict[str, np.ndarray]:
    """Slice and head values away from zero."""
    return tiny.flat(tiny.moved_slices(exported.reference))


@pytest.fixture
def data(tmp_path) -> Path:
    """Eight rows of real text with labels in turn."""
    return write_labelled_rows(tmp_path / "data.jsonl")


@pytest.fixture
def train_job(prepared_in, values, data, tmp_path):
    """Builds training jobs; keyword arguments change the task, ``job`` changes the job."""

    def build(prepared: PreparedPackage | None = None, job: dict | None = None, **task: object) -> TrainJob:
        prepared = prepared or prepared_in["row_int8"]
        package = prepared.package
        state = tmp_path / "state.safetensors"
        if not state.exists():
            state.write_bytes(encode_values(values))
        settings = {
            "package_folder": str(package.folder),
            "package_sha256": package.sha256,
            "prepared_folder": str(prepared.folder),
            "state_path": str(state),
            "data_path": str(data),
            "delta_path": str(tmp_path / "change.safetensors"),
            "task": tiny.make_task(package, **task),
            "cap_bytes": 1024 * MIB,
            **(job or {}),
        }
        return TrainJob(**settings)

    return build


def delta_of(job: TrainJob) -> dict[str, np.ndarray]:
    package = Package.open_known(Path(job.package_folder), job.package_sha256)
    specs = [spec for spec in package.manifest.slices if spec.name in job.task.slices]
    heads = [package.manifest.head] if job.task.train_head else []
    return decode_values(Path(job.delta_path).read_bytes(), [*specs, *heads])


def test_best_takes_exact_gradients_where_they_fit(train_job) -> None:
    """A task that leaves the estimator open is done exactly in row_int8, and says so: the change is the same."""
    best = train_job(update="best", draws=4)
    outcome = run_worker(best, TrainOutcome)
    assert (outcome.plan.work.update, outcome.plan.work.draws) == ("backprop", 1)
    assert outcome.plan.reason.startswith("exact gradients")
    made = Path(best.delta_path).read_bytes()
    exact = train_job(update="backprop", draws=1)
    run_worker(exact, TrainOutcome)
    assert Path(exact.delta_path).read_bytes() == made


def test_best_takes_forward_mode_where_adjoints_cannot_run(train_job, prepared_in) -> None:
    """Prepared in block_int8 the same task takes all its draws, and its result names the estimator and the draws."""
    best = train_job(prepared_in["block_int8"], update="best", draws=4, directions="dealt")
    outcome = run_worker(best, TrainOutcome)
    assert (outcome.plan.work.update, outcome.plan.work.draws) == ("forward", 4)
    assert "products cannot be transposed" in outcome.plan.reason
    assert outcome.draws_skipped > 0
    change = Path(best.delta_path).read_bytes()
    result = decode_result(build_result(best.task, outcome, change))
    assert (result.update, result.draws) == ("forward", 4)
    forward = train_job(prepared_in["block_int8"], update="forward", draws=4, directions="dealt")
    told = decode_result(build_result(forward.task, run_worker(forward, TrainOutcome), change))
    assert Path(forward.delta_path).read_bytes() == change
    assert (told.update, told.draws) == (None, 0)


def test_a_job_done_twice_gives_the_same_bytes(train_job, tmp_path) -> None:
    """Two processes on one job write bit-identical changes; another seed writes others."""
    made = []
    for name, seed in (("a", 11), ("b", 11), ("c", 12)):
        job = train_job(job={"delta_path": str(tmp_path / name)}, seed=seed)
        outcome = run_worker(job, TrainOutcome)
        assert (outcome.steps_applied, outcome.steps_skipped, outcome.examples) == (2, 0, 8)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_a_worker_that_is_told_to_stop_goes_on_where_it_stood(train_job, tmp_path) -> None:
    """SIGTERM ends the process after its present step; the next process takes up the rest, to the same bytes."""
    path = tmp_path / "task.progress"
    many = {"steps": 300, "optimizer": LocalOptimizer("adamw", 0.01, 0.01)}
    job = train_job(job={"progress_path": str(path)}, **many)
    worker = start_worker(job)
    while not _catches(worker.process.pid, signal.SIGTERM):
        assert worker.process.poll() is None
        time.sleep(0.005)
    worker.tell_to_stop()
    with pytest.raises(WorkerError, match="told to stop, and did before step"):
        finish_worker(worker, TrainOutcome, 60)
    assert not Path(job.delta_path).exists()
    stopped = path.read_bytes()
    assert run_worker(job, TrainOutcome).steps_applied == 300
    resumed = Path(job.delta_path).read_bytes()
    path.unlink()
    run_worker(job, TrainOutcome)
    assert Path(job.delta_path).read_bytes() == resumed
    path.write_bytes(stopped)  # of other work
    other = train_job(job={"progress_path": str(path)}, seed=12, steps=2)
    assert run_worker(other, TrainOutcome).steps_applied == 2


def _catches(process_id: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process_id}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def test_one_accumulated_step_is_what_torch_computes(train_job, exported, float_prepared) -> None:
    """The change of one step is -rate times the estimate made from backpropagation's gradients."""
    job = train_job(float_prepared, steps=1, draws=3, optimizer=LocalOptimizer("accumulate", 0.5, 0.25))
    outcome = run_worker(job, TrainOutcome)
    manifest, task = float_prepared.manifest, job.task
    rows = load_rows(Path(job.data_path), manifest.labels)
    chosen = draw_batches(8, seed=task.seed, round_number=1, slot=0, steps=1, batch_size=4)[0]
    ids = Tokenizer(float_prepared.package.path(manifest.tokenizer), 32).encode([rows[i] for i in chosen])
    batch = make_batch(ids, [rows[i].label for i in chosen], pad_token_id=manifest.pad_token_id)
    slices = tiny.moved_slices(exported.reference)
    specs = [spec for spec in manifest.slices if spec.kind != "head"]
    tangents = draw_tangents(task, specs, 0, range(4))
    loss, jvps = tiny.backprop_jvps(exported.reference, slices, batch, tangents)
    heads = {name: slices[name].clone().requires_grad_() for name in ("head.weight", "head.bias")}
    result = exported.reference.run(tiny.torch_batch(batch), {**slices, **heads})["loss"].mean()
    head = torch.autograd.grad(result, list(heads.values()))
    expected = {name: -0.5 * value for name, value in estimate(jvps, tangents).items()}
    expected |= {name.replace(".", "/"): -0.25 * g.numpy() for name, g in zip(heads, head, strict=True)}
    got = delta_of(job)
    assert set(got) == set(expected)
    for name, wanted in expected.items():
        assert np.abs(got[name] - wanted).max() < 1e-3 * np.abs(wanted).max(), name
    assert outcome.mean_loss == pytest.approx(float(loss.mean()), rel=1e-4)


def test_training_lowers_the_loss(train_job) -> None:
    """Over twenty SGD steps on the same eight rows the mean loss is below the first step's (measured: 1.19, 1.00)."""
    job = train_job(steps=20, batch_size=8, draws=4, optimizer=LocalOptimizer("sgd", 0.01, 0.02))
    first = run_worker(train_job(steps=1, batch_size=8), TrainOutcome).mean_loss
    later = run_worker(job, TrainOutcome).mean_loss
    assert first is not None
    assert later is not None
    assert later < first - 0.05


def test_a_head_only_task_changes_the_head_alone(train_job) -> None:
    """Without slices no tangent runs, and the change holds the head's two tensors."""
    job = train_job(slices=(), steps=1)
    run_worker(job, TrainOutcome)
    assert set(delta_of(job)) == {"head/weight", "head/bias"}
    assert all(np.abs(value).max() > 0 for value in delta_of(job).values())


def test_only_assigned_slices_change(train_job) -> None:
    """A task of one slice without the head reports that slice and nothing else."""
    job = train_job(slices=(QUERY,), train_head=False)
    run_worker(job, TrainOutcome)
    assert set(delta_of(job)) == {f"{QUERY}/core"}


@pytest.mark.parametrize(
    "settings",
    [
        {"draws": 3},
        {"directions": "gaussian", "head": "perturbed", "loss": "phuber"},
        {"update": "zero_order", "directions": "orthogonal"},
    ],
    ids=["forward", "perturbed head", "zero order"],
)
def test_a_report_of_scalars_replays_to_the_bytes_of_the_weights(
    train_job, float_prepared, values, settings: dict
) -> None:
    """What one worker wrote as scalars gives, replayed here, the file that another wrote as weights."""
    job = train_job(float_prepared, batch_size=5, **settings)
    run_worker(job, TrainOutcome)
    weights = Path(job.delta_path).read_bytes()
    job = train_job(float_prepared, batch_size=5, report="scalars", **settings)
    run_worker(job, TrainOutcome)
    sent = Path(job.delta_path).read_bytes()
    assert sent != weights
    report = decode_report(sent, job.task, float_prepared.manifest.slices)
    heads = {name: array for name, array in report.items() if name.startswith("head/")}
    made = replay(job.task, float_prepared.manifest.slices, values, report)
    assert encode_values({**made, **heads}) == weights


@pytest.mark.parametrize("asked", [{"directions": "filtered", "candidates": 4}, {"directions": "dealt"}])
def test_a_reference_needs_its_file(
    train_job, float_prepared, values, tmp_path, asked: dict[str, object]
) -> None:
    """A reference that the task names is read and checked; a job without its file is refused, not done otherwise."""
    path = tmp_path / "reference.safetensors"
    path.write_bytes(encode_values({name: -value for name, value in values.items()}))
    task = {**asked, "reference": "1" * 64}
    job = train_job(float_prepared, {"reference_path": str(path)}, **task)
    run_worker(job, TrainOutcome)
    compared = Path(job.delta_path).read_bytes()
    run_worker(train_job(float_prepared, **{**task, "reference": None}), TrainOutcome)
    assert Path(job.delta_path).read_bytes() != compared
    with pytest.raises(WorkerError, match="names a reference, and the job has no file"):
        run_worker(train_job(float_prepared, **task), TrainOutcome)
    path.write_bytes(encode_values({"head/bias": values["head/bias"]}))
    with pytest.raises(SliceError, match="lacks tensor"):
        run_worker(train_job(float_prepared, {"reference_path": str(path)}, **task), TrainOutcome)


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_zero_order_takes_the_memory_of_inference(train_job, difference: str) -> None:
    """Its peak is predicted within a tenth, and draws change it by no more than their directions."""
    outcomes = []
    for draws in (1, 16):
        job = train_job(
            update="zero_order", directions="gaussian", batch_size=8, draws=draws, difference=difference
        )
        outcome = run_worker(job, TrainOutcome)
        assert outcome.plan.choice.draws_at_a_time == 1
        assert outcome.memory.predicted_peak_bytes == pytest.approx(outcome.memory.high_water_bytes, rel=0.1)
        outcomes.append(outcome)
    few, many = outcomes
    cores = 16 * len(job.task.slices)
    assert many.plan.peak.slices_bytes - few.plan.peak.slices_bytes == 2 * 4 * cores * 15
    assert many.plan.peak.live_bytes == few.plan.peak.live_bytes
    assert many.memory.high_water_bytes - few.memory.high_water_bytes < 2 * MIB


def test_a_cap_too_small_is_refused_with_both_figures(train_job) -> None:
    """A cap the worker can start in but not train in is refused first: both numbers, and no change file."""
    job = train_job(job={"cap_bytes": 48 * MIB})
    with pytest.raises(CapExceededError, match="the cap is 48 MiB") as caught:
        run_worker(job, TrainOutcome)
    assert caught.value.cap_bytes == 48 * MIB
    assert caught.value.required_bytes > 48 * MIB
    assert f"needs a cap of {caught.value.required_bytes >> 20} MiB" in str(caught.value)
    assert not Path(job.delta_path).exists()


def test_a_step_that_is_not_finite_is_skipped_and_counted(train_job, values, data, tmp_path) -> None:
    """Steps whose loss overflows leave no trace but a count; the others apply.

    The head's bias prefers class 0 over class 1 by more than float32 holds: rows of class 1 have an infinite
    loss. One row a step, each row once: two of five steps are skipped.
    """
    values["head/bias"] = np.array([3e38, -3e38, 0], dtype=np.float32)
    (tmp_path / "state.safetensors").write_bytes(encode_values(values))
    labels = ("bad", "good", "bad", "good", "bad")
    rows = zip(tiny.SENTENCES, labels, strict=False)
    data.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows))
    job = train_job(steps=5, batch_size=1)
    outcome = run_worker(job, TrainOutcome)
    assert (outcome.steps_applied, outcome.steps_skipped, outcome.examples) == (3, 2, 3)
    assert outcome.mean_loss is not None
    assert np.isfinite(outcome.mean_loss)
    assert all(np.isfinite(value).all() for value in delta_of(job).values())


def test_a_task_without_a_finite_step_changes_nothing(train_job, values, data, tmp_path) -> None:
    """If every step is skipped the change is zero and there is no mean loss."""
    values["head/bias"] = np.array([3e38, -3e38, 0], dtype=np.float32)
    (tmp_path / "state.safetensors").write_bytes(encode_values(values))
    data.write_text(json.dumps({"text": "good", "label": "good"}) + "\n")
    job = train_job(steps=2, batch_size=1)
    outcome = run_worker(job, TrainOutcome)
    assert (outcome.steps_applied, outcome.steps_skipped, outcome.examples) == (0, 2, 0)
    assert outcome.mean_loss is None
    assert not any(value.any() for value in delta_of(job).values())


def test_evaluation_counts_what_torch_counts(exported, float_prepared, train_job) -> None:
    """Accuracy and mean loss over all rows equal the torch reference's."""
    outcome = run_worker(evaluation_before(train_job(float_prepared), 32), EvaluateOutcome)
    batch = tiny.torch_batch(tiny.make_text_batch(float_prepared.package))
    result = exported.reference.run(batch, tiny.moved_slices(exported.reference))
    correct = (result["logits"].argmax(1) == batch["labels"]).float().mean()
    assert outcome.rows == 8
    assert outcome.accuracy == pytest.approx(float(correct))
    assert outcome.mean_loss == pytest.approx(float(result["loss"].mean()), rel=1e-4)
    assert set(outcome.memory.phases) == {"start", "load", "evaluate"}


def test_the_peak_is_predicted_within_a_tenth(train_job) -> None:
    """Predicted and measured peak of a training worker differ by at most a tenth, and every phase is reported."""
    memory = run_worker(train_job(batch_size=8, draws=8), TrainOutcome).memory
    assert memory.predicted_peak_bytes == pytest.approx(memory.high_water_bytes, rel=0.1)
    assert set(memory.phases) == {"start", "load", "step", "serialise"}
    assert memory.high_water_bytes == max(memory.phases.values())
    assert 0 < memory.floor_bytes < memory.high_water_bytes <= memory.cap_bytes


def test_a_killed_worker_is_a_worker_error(train_job) -> None:
    """A worker killed in the middle ends the job with the signal's name and leaves no change."""
    job = train_job(steps=100_000)
    process = start_worker(job)
    process.kill()
    with pytest.raises(WorkerError, match="SIGKILL"):
        finish_worker(process, TrainOutcome)
    assert not Path(job.delta_path).exists()


def test_a_weight_file_truncated_under_a_worker_is_told(prepared_in, train_job, tmp_path) -> None:
    """A worker whose mapped file is cut short dies by SIGBUS; the error says so, in one line with what to do."""
    prepared = prepared_in["row_int8"]
    folder = shutil.copytree(prepared.folder, tmp_path / "prepared")
    job = train_job(job={"prepared_folder": str(folder)}, steps=100_000)
    sampler, process = Sampler(), start_worker(job)

    def truncate() -> None:
        while sampler.phase != "step" and process.process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1)
        for path in folder.glob("*.bin"):
            os.truncate(path, 0)

    thread = threading.Thread(target=truncate)
    thread.start()
    with pytest.raises(
        WorkerError, match=r"killed by SIGBUS: a weight file was truncated.*check the disk"
    ) as caught:
        finish_worker(process, TrainOutcome, timeout_s=60, sampler=sampler)
    thread.join()
    assert "\n" not in str(caught.value)
    assert not Path(job.delta_path).exists()


@pytest.mark.parametrize("arithmetic", ["row_int8", "block_int8", "float"])
def test_a_prefix_cache_changes_time_and_nothing_else(
    prepared_in, train_job, tmp_path, arithmetic: str
) -> None:
    """With and without a cache a task on the last block writes the same bytes; rows that come again are hits."""
    outcomes, changes = [], []
    for name, size in (("without", 0), ("with", 64 * MIB), ("short", 20_000)):
        path = tmp_path / name / "change"
        path.parent.mkdir()
        settings = {"delta_path": str(path), "prefix_cache_bytes": size}
        job = train_job(prepared_in[arithmetic], settings, slices=(QUERY,), steps=8, draws=4)
        outcomes.append(run_worker(job, TrainOutcome))
        changes.append(path.read_bytes())
        assert list(path.parent.iterdir()) == [path]
    without, cached, short = outcomes
    assert changes[0] == changes[1] == changes[2]
    assert (without.prefix_hits, without.prefix_misses) == (0, 0)
    assert cached.prefix_hits + cached.prefix_misses == 8 * 4
    assert cached.prefix_hits > cached.prefix_misses
    assert cached.prefix_hits > short.prefix_hits > 0


def test_a_task_on_the_first_block_keeps_no_prefix(train_job) -> None:
    """Before the first block there is only the embedding, which is cheaper to run than to read back."""
    outcome = run_worker(train_job(job={"prefix_cache_bytes": 64 * MIB}), TrainOutcome)
    assert (outcome.prefix_hits, outcome.prefix_misses) == (0, 0)


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("arithmetic", ["row_int8", "block_int8", "float"])
def test_how_the_work_is_done_does_not_change_the_result(
    prepared_in, train_job, arithmetic: str, weights
) -> None:
    """Draws at a time and streaming change no bit of a task's change; smaller groups only the last digits.

    Groups of another size are padded to other lengths, so sums are made in another order. In int8 a last digit
    may move an activation to the next of 127 levels, here and there.
    """

    def delta(choice: ExecutionChoice) -> dict[str, np.ndarray]:
        job = train_job(prepared_in[arithmetic], {"choice": choice}, draws=5, steps=1)
        assert run_worker(job, TrainOutcome).plan.choice == choice
        return delta_of(job)

    wanted = delta(ExecutionChoice("resident", 4, 5))
    for at_a_time in (1, 2, 5):
        got = delta(ExecutionChoice(weights, 4, at_a_time))
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    split = delta(ExecutionChoice(weights, 1, 5))
    for name, array in wanted.items():
        limit = 1e-4 if arithmetic == "float" else 0.05
        assert np.abs(split[name] - array).max() < limit * np.abs(array).max()


@pytest.mark.parametrize(("arithmetic", "weights"), [("row_int8", "resident"), ("float", "streamed")])
def test_the_account_adds_up(prepared_in, train_job, arithmetic: str, weights) -> None:
    """The parts that a worker measured are those that were predicted, and add up to its peak within 5 %."""
    choice = ExecutionChoice(weights, 8, 4)
    job = train_job(prepared_in[arithmetic], {"choice": choice}, batch_size=8, draws=4, steps=6)
    outcome = run_worker(job, TrainOutcome)
    measured = {part.name: part.measured_bytes for part in outcome.bins}
    assert set(measured) == set(outcome.plan.peak.parts)
    assert all(size >= 0 for size in measured.values())
    assert measured["libraries"] <= outcome.memory.floor_bytes
    total = sum(measured.values())
    assert total == pytest.approx(outcome.memory.phases["step"], rel=0.05)
    assert [step.end_s for step in outcome.steps] == sorted(step.end_s for step in outcome.steps)
    assert len(outcome.steps) == 6
    assert max(step.resident_bytes for step in outcome.steps) <= outcome.memory.high_water_bytes


def test_a_package_is_prepared_by_a_worker(exported, tmp_path) -> None:
    """A prepare job leaves a folder that a later one finds current; damaged, it is made again."""
    folder = tmp_path / "prepared"
    job = PrepareJob(
        str(exported.package.folder), exported.package.sha256, str(folder), 1024 * MIB, arithmetic="float"
    )
    outcome = run_worker(job, PrepareOutcome)
    assert outcome.arithmetic == "float"
    assert [candidate.arithmetic for candidate in outcome.candidates] == ["float"]
    assert set(outcome.memory.phases) == {"start", "prepare"}
    made = (folder / "block_0.bin").stat().st_mtime_ns
    ensure_prepared(job)
    assert (folder / "block_0.bin").stat().st_mtime_ns == made
    os.truncate(folder / "block_0.bin", 4096)
    ensure_prepared(job)
    assert is_current(folder, exported.package.sha256)
    assert (folder / "block_0.bin").stat().st_mtime_ns != made


@pytest.mark.parametrize("data_in", [b"", b"nonsense", b'{"a": "\xff"}', b'{"type": "train"}'])
def test_a_malformed_job_is_reported(data_in: bytes) -> None:
    """Bytes that are no job end the worker with a Failure that says so, and no traceback."""
    command = [sys.executable, "-m", "edge_runtime.worker.main"]
    done = subprocess.run(command, input=data_in, capture_output=True, check=False)
    assert done.returncode == FAILURE_EXIT_CODE
    failure = msgspec.json.decode(done.stdout, type=Failure)
    assert failure.kind == "WorkerError"
    assert failure.message.startswith("malformed job")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("delta", "error", "message"),
    [
        ({"state_path": "/nowhere"}, WorkerError, "cannot read the slice values /nowhere"),
        ({"data_path": "/nowhere"}, DataError, "/nowhere"),
        ({"package_folder": "/nowhere"}, PackageError, "/nowhere"),
        ({"package_sha256": "1" * 64}, DigestError, "the task names 1111"),
        ({"prepared_folder": "/nowhere"}, PreparationError, "No such file or directory; agents prepare"),
    ],
    ids=["state", "data", "package", "digest", "prepared"],
)
def test_what_cannot_be_used_is_named(train_job, delta: dict, error: type[Exception], message: str) -> None:
    """Each input that is missing or not to be trusted comes back as its own error, and nothing is written."""
    job = train_job(job=delta)
    with pytest.raises(error, match=message):
        run_worker(job, TrainOutcome)
    assert not Path(job.delta_path).exists()


def test_a_state_that_is_not_finite_is_refused(train_job, values, tmp_path) -> None:
    """Values that hold a NaN are refused by tensor name before training."""
    values["head/bias"][1] = np.nan
    (tmp_path / "state.safetensors").write_bytes(encode_values(values))
    with pytest.raises(SliceError, match="head/bias"):
        run_worker(train_job(), TrainOutcome)


def test_an_unknown_slice_is_refused(train_job) -> None:
    """A task on a slice the package does not have is refused with its name."""
    with pytest.raises(PackageError, match="elsewhere"):
        run_worker(train_job(slices=("elsewhere",)), TrainOutcome)
