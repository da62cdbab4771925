"""Language modelling on the device: next-token labels, training and evaluation of a model that is known by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.data.batches import NOT_PREDICTED, Batch, Tokenizer, draw_batches, make_batch
from edge_runtime.data.rows import Row, check_rows, load_rows
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import DataError, PackageError
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prepare import prepare
from edge_runtime.memory.plan import ExecutionChoice, Planner, Work
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import decode_values, encode_values
from edge_runtime.protocol.messages import LocalOptimizer, Task
from edge_runtime.protocol.signing import generate_key
from edge_runtime.training.gradient import estimate
from edge_runtime.training.tangents import draw_tangents
from edge_runtime.worker.jobs import EvaluateOutcome, TrainJob, TrainOutcome
from edge_runtime.worker.process import run_worker
from tests.edge_runtime.bigram import CORE, HIDDEN, SLICE, Bigram, write_bigram
from tests.edge_runtime.jobs import evaluation_before

MIB = 1 << 20
TEXTS = ("the cat sat", "the dog ran home", "the cat ran", "home sat the dog the cat", "dog ran")


@pytest.fixture(scope="module")
def bigram(tmp_path_factory) -> Bigram:
    """The package that was written by hand."""
    return write_bigram(tmp_path_factory.mktemp("bigram") / "package", generate_key())


@pytest.fixture(scope="module")
def prepared(bigram, tmp_path_factory) -> PreparedPackage:
    """It, prepared for this machine."""
    return prepare(bigram.package, tmp_path_factory.mktemp("prepared") / "package", OnnxEngine(), "float")


@pytest.fixture(scope="module")
def core() -> np.ndarray:
    """A slice value away from zero, (1, H, H)."""
    return np.random.default_rng(8).normal(0, 0.2, (1, HIDDEN, HIDDEN)).astype(np.float32)


@pytest.fixture
def data(tmp_path) -> Path:
    """Rows of text alone, of different lengths."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def batch_of(bigram: Bigram, texts=TEXTS) -> Batch:
    tokenizer = Tokenizer(bigram.package.path("tokenizer.json"), 16)
    return make_batch(tokenizer.encode([Row(text) for text in texts]), None, pad_token_id=0)


def make_task(bigram: Bigram, **changes) -> Task:
    settings = {
        "task_id": "t",
        "run_id": "r",
        "round": 0,
        "slot": 0,
        "seed": 3,
        "package": bigram.package.sha256,
        "package_signature": "A" * 86 + "==",
        "state": "0" * 64,
        "slices": (SLICE,),
        "train_head": False,
        "steps": 1,
        "batch_size": 5,
        "draws": 3,
        "sequence_limit": 16,
        "optimizer": LocalOptimizer("accumulate", 0.5),
        "required_bytes": 0,
        "deadline_s": 0.0,
        **changes,
    }
    return Task(**settings)


@pytest.fixture
def train_job(bigram, prepared, core, data, tmp_path):
    """Builds training jobs; keyword arguments change the task."""

    def build(**changes) -> TrainJob:
        state = tmp_path / "state.safetensors"
        state.write_bytes(encode_values({CORE: core}))
        return TrainJob(
            str(bigram.package.folder),
            bigram.package.sha256,
            str(prepared.folder),
            str(state),
            str(data),
            str(tmp_path / "change.safetensors"),
            make_task(bigram, **changes),
            1024 * MIB,
        )

    return build


def test_a_label_is_the_token_that_follows() -> None:
    """Each place is labelled with the next token; the last token, and padding, predict nothing."""
    batch = make_batch([[5, 6], [7, 8, 9]], None, pad_token_id=8, sequence_limit=16)
    assert batch.input_ids.shape == (2, 8)
    nothing = [NOT_PREDICTED] * 5
    assert batch.labels.tolist() == [
        [6, NOT_PREDICTED, NOT_PREDICTED, *nothing],
        [8, 9, NOT_PREDICTED, *nothing],
    ]
    assert batch.predicted.tolist() == [1, 2]
    assert make_batch([[5], [6]], [0, 1], pad_token_id=0).predicted.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("row", "labels", "why"),
    [
        (
            b'{"text": "confidential", "label": "no"}',
            (),
            "has a label, and rows of language modelling have none",
        ),
        (b'{"content": "confidential"}', (), "rename the column 'content' to 'text'"),
        (b'{"text": "confidential", "answer": "confidential"}', (), "has a column 'answer' beside 'text'"),
        (b'{"text": "confidential"}', ("no", "yes"), "has no label; give it one"),
    ],
)
def test_rows_must_suit_the_task(tmp_path, row: bytes, labels: tuple[str, ...], why: str) -> None:
    """A label where none belongs, or none where one does, is refused by line, and the row is not quoted."""
    good = b'{"text": "fine", "label": "no"}\n' if labels else b'{"text": "fine"}\n'
    path = tmp_path / "data.jsonl"
    path.write_bytes(good + row + b"\n")
    with pytest.raises(DataError, match="line 2") as caught:
        load_rows(path, labels)
    assert why in str(caught.value)
    assert "confidential" not in str(caught.value)
    with pytest.raises(DataError, match="line 2"):
        check_rows(path)


def test_rows_of_text_alone_are_read(data) -> None:
    """Without a label set, rows are texts; a check without the package accepts them too."""
    assert [row.text for row in load_rows(data, ())] == list(TEXTS)
    assert check_rows(data).rows == len(TEXTS)


def test_one_sweep_gives_the_loss_and_jvp_known_by_hand(bigram, prepared, core) -> None:
    """Loss, right tokens and directional derivatives are those of the closed form, however the batch is cut."""
    batch = batch_of(bigram)
    task = make_task(bigram)
    specs = [bigram.package.manifest.slice_named(SLICE)]
    executor = Executor(prepared, OnnxEngine(), [SLICE])
    expected_loss, expected_right = bigram.loss(batch, core[0])
    for groups in ([list(range(5))], [[4, 0], [2], [1, 3]]):
        micro = [batch_of(bigram, [TEXTS[row] for row in group]) for group in groups]
        tangents = [draw_tangents(task, specs, 0, group) for group in groups]
        sweep = executor.sweep({CORE: core}, micro, tangents)
        order = [row for group in groups for row in group]
        directions = np.concatenate([tangent[CORE] for tangent in tangents], axis=1)
        expected = np.einsum("kbij,bij->kb", directions, bigram.gradients(batch, core[0])[order])
        np.testing.assert_allclose(sweep.loss, expected_loss[order], rtol=1e-5)
        np.testing.assert_allclose(sweep.jvps, expected, rtol=1e-4, atol=1e-5)
        assert sweep.correct.tolist() == expected_right[order].tolist()
    assert sweep.logits is sweep.residual is sweep.features is None


def test_a_step_is_what_the_closed_form_gives(bigram, train_job, core) -> None:
    """A worker's change after one step is -rate times the estimate made from the exact gradients."""
    job = train_job()
    outcome = run_worker(job, TrainOutcome)
    chosen = draw_batches(5, seed=3, round_number=0, slot=0, steps=1, batch_size=5)[0]
    batch = batch_of(bigram, [TEXTS[row] for row in chosen])
    tangents = draw_tangents(job.task, [bigram.package.manifest.slice_named(SLICE)], 0, range(5))
    jvps = np.einsum("kbij,bij->kb", tangents[CORE], bigram.gradients(batch, core[0]))
    delta = decode_values(Path(job.delta_path).read_bytes(), bigram.package.manifest.slices)[CORE]
    np.testing.assert_allclose(delta, -0.5 * estimate(jvps, tangents)[CORE], rtol=1e-3, atol=1e-5)
    assert outcome.mean_loss == pytest.approx(float(bigram.loss(batch, core[0])[0].mean()), rel=1e-5)


def test_training_lowers_the_loss(train_job) -> None:
    """Forty steps of SGD on five rows bring the mean training loss clearly below the first step's."""
    first = run_worker(train_job(), TrainOutcome).mean_loss
    later = run_worker(train_job(steps=40, draws=8, optimizer=LocalOptimizer("sgd", 0.05)), TrainOutcome)
    assert first is not None
    assert later.mean_loss is not None
    assert later.mean_loss < first - 0.2


def test_evaluation_is_over_tokens_not_rows(bigram, prepared, core, train_job) -> None:
    """Loss and accuracy weigh each predicted token alike: a long row counts for more than a short one."""
    outcome = run_worker(evaluation_before(train_job(), 16), EvaluateOutcome)
    batch = batch_of(bigram)
    loss, right = bigram.loss(batch, core[0])
    weights = np.array([len(text.split()) - 1 for text in TEXTS])
    assert (outcome.rows, outcome.tokens) == (5, weights.sum())
    assert outcome.mean_loss == pytest.approx(float((loss * weights).sum() / weights.sum()), rel=1e-5)
    assert outcome.mean_loss != pytest.approx(float(loss.mean()), rel=1e-3)
    assert outcome.accuracy == pytest.approx(right.sum() / weights.sum())


def test_a_row_of_one_token_is_named(train_job, data) -> None:
    """A row that leaves nothing to predict is refused by number, without its text, and nothing is written."""
    data.write_text('{"text": "the cat"}\n{"text": "home"}\n')
    job = train_job()
    with pytest.raises(DataError, match="row 2 of the data gives 1 token within the limit of 16") as caught:
        run_worker(job, TrainOutcome)
    assert "home" not in str(caught.value)
    assert not Path(job.delta_path).exists()


def test_a_head_that_is_not_there_is_not_trained(train_job) -> None:
    """A task that asks for a head is refused by a package without one."""
    with pytest.raises(PackageError, match=r"bigram has no head to train.*train_head = false"):
        run_worker(train_job(train_head=True), TrainOutcome)


def test_labels_that_wait_are_counted(bigram) -> None:
    """The prediction of what waits between segments has room for a label of each token."""
    planner, work = Planner(bigram.package.manifest, "float"), Work(4, 16, 1, (SLICE,))
    waiting = planner.predict(work, ExecutionChoice("resident", 4, 1)).waiting_bytes
    hidden, masks, labels = 2 * 4 * 16 * HIDDEN * 4, 4 * 16 * 16 * 4, 4 * 16 * 8
    assert waiting == hidden + masks + labels
