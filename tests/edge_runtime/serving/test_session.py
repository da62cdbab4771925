"""A worker that stays: what it answers, beside other readers of the same values, and how it ends."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import (
    CapExceededError,
    ConfigError,
    DataError,
    OutOfMemoryError,
    SliceError,
    WorkerError,
)
from edge_runtime.execution.class_logits import class_logits
from edge_runtime.execution.executor import Executor
from edge_runtime.inference.requests import Finished, GenerateText, Piece, Sampling
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import encode_values, shapes
from edge_runtime.serving.session import InferenceSession
from edge_runtime.serving.source import Model, model_of_folder
from edge_runtime.worker.process import launch_worker
from export.adapters.merge import merge
from tests.export import tiny

MIB = 1 << 20


@pytest.fixture(scope="module")
def session(classifier: Model):
    """A worker with the classifier."""
    with InferenceSession.start(classifier.job()) as session:
        yield session


def test_transformers_predicts_the_same_from_the_merged_folder(
    exported_plain, values, session, tiny_model: Path, tmp_path: Path
) -> None:
    """Labels are equal, and probabilities within 1e-4, of a merged folder read by transformers alone."""
    package = exported_plain.package
    merged = merge(package, values, tiny_model, tmp_path / "merged").folder
    spec = importlib.util.spec_from_file_location("load_classifier", merged / "load_classifier.py")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    classify, labels = loader.load(str(merged))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    found = set()
    for text in tiny.SENTENCES:
        with torch.no_grad():
            given = tokenizer([text], return_tensors="pt", truncation=True, max_length=32)
            logits = classify(given["input_ids"], given["attention_mask"])
        expected = torch.softmax(logits, -1)[0].numpy()
        answer = session.classify(text)
        assert answer.label == labels[int(expected.argmax())]
        assert list(answer.probabilities) == labels
        np.testing.assert_allclose(list(answer.probabilities.values()), expected, atol=1e-4)
        assert sum(answer.probabilities.values()) == pytest.approx(1)
        found.add(answer.label)
    assert len(found) > 1


def test_int8_predicts_nearly_the_same(exported, prepared_in, tmp_path: Path) -> None:
    """The int8 package gives the labels of its own float arithmetic, with probabilities within 0.05."""
    generator = np.random.default_rng(3)
    state = tmp_path / "slices.safetensors"
    drawn = {
        name: (0.3 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes(exported.package.manifest.slices).items()
    }
    state.write_bytes(encode_values(drawn))
    answers = {}
    for arithmetic in ("row_int8", "float"):
        model = Model(exported.package, state, prepared_in[arithmetic].folder, 1 << 30, threads=1)
        with InferenceSession.start(model.job()) as worker:
            assert worker.ready.arithmetic == arithmetic
            answers[arithmetic] = [worker.classify(text) for text in tiny.SENTENCES]
    for exact, rounded in zip(answers["float"], answers["row_int8"], strict=True):
        assert rounded.label == exact.label
        difference = np.subtract(list(exact.probabilities.values()), list(rounded.probabilities.values()))
        assert np.abs(difference).max() < 0.05


def test_a_head_over_several_blocks_is_used_like_any_other(
    exported_plain, classifier, tmp_path: Path
) -> None:
    """The file of slices says what its head reads, and the worker gives what the executor gives in this process."""
    blocks = (0, 2)
    prepared = PreparedPackage.as_stored(exported_plain.package).with_head(blocks, "mean")
    generator = np.random.default_rng(7)
    drawn = {
        name: (0.3 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes(prepared.manifest.slices).items()
    }
    state = tmp_path / "slices.safetensors"
    state.write_bytes(encode_values(drawn, prepared.manifest))
    folder, key = exported_plain.package.folder, exported_plain.key.public_key
    named = model_of_folder(folder, state, key, classifier.cap_bytes, 1, "onnxruntime", None)
    assert (named.features, named.pooling) == (blocks, "mean")
    model = replace(classifier, state_path=state, features=named.features, pooling=named.pooling)
    batch = tiny.make_text_batch(exported_plain.package, tiny.SENTENCES[:1])
    logits = class_logits(Executor(prepared, OnnxEngine(threads=1)).sweep(drawn, [batch]))[0]
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    with InferenceSession.start(model.job()) as worker:
        answer = worker.classify(tiny.SENTENCES[0])
    np.testing.assert_allclose(list(answer.probabilities.values()), expected, atol=1e-4)
    with pytest.raises(SliceError, match="head/weight"):
        InferenceSession.start(replace(model, features=()).job())


def test_a_long_text_is_cut_at_the_limit(session) -> None:
    """It is classified by the tokens that are left, as in training."""
    assert session.classify("good " * 500).tokens == 32


def test_a_text_without_a_token_costs_one_request(session) -> None:
    """Its error quotes nothing, and the next request is answered by the same worker."""
    before = session.classify("good").label
    with pytest.raises(ConfigError, match="classifies; it generates no text"):
        list(session.generate(GenerateText("good")))
    assert session.alive
    assert session.classify("good").label == before


def test_pieces_come_one_by_one_and_closing_early_stops_them(language_model: Model) -> None:
    """Whoever takes three pieces and leaves gets the worker back for the next request."""
    with InferenceSession.start(language_model.job()) as worker:
        whole = list(worker.generate(GenerateText("the cat")))
        assert isinstance(whole[-1], Finished)
        assert all(isinstance(piece, Piece) for piece in whole[:-1])
        answers = worker.generate(GenerateText("the cat"))
        assert [next(answers) for _ in range(3)] == whole[:3]
        answers.close()
        assert not worker.busy
        again = list(worker.generate(GenerateText("the cat", Sampling(max_tokens=2))))
        assert again[:2] == whole[:2]
        with pytest.raises(ConfigError, match="generates text; it has no labels"):
            worker.classify("the cat")
        with pytest.raises(DataError, match="has 16 tokens or more"):
            list(worker.generate(GenerateText("home " * 40)))


def test_the_cap_refuses_before_anything_runs(classifier: Model) -> None:
    """A cap below every plan is refused with both figures."""
    with pytest.raises(CapExceededError) as refused:
        InferenceSession.start(replace(classifier, cap_bytes=32 * MIB).job())
    assert refused.value.cap_bytes == 32 * MIB
    assert refused.value.required_bytes > 32 * MIB


def test_values_that_do_not_fit_are_refused(classifier: Model, tmp_path: Path) -> None:
    """Values of another package, or none, are told by what is wrong with them."""
    (tmp_path / "other").write_bytes(encode_values({"other/core": np.zeros((1, 2), np.float32)}))
    with pytest.raises(SliceError, match="unknown slice tensor other/core"):
        InferenceSession.start(replace(classifier, state_path=tmp_path / "other").job())
    with pytest.raises(ConfigError, match="cannot read the slice values"):
        InferenceSession.start(replace(classifier, state_path=tmp_path / "missing").job())


def test_the_kernel_holds_the_worker_to_its_cap(classifier: Model) -> None:
    """A worker that grows past its cap ends as out of memory, and whoever asked learns it."""
    greedy = (
        "import sys, msgspec; from edge_runtime.worker.inference_jobs import Ready\n"
        "sys.stdin.readline(); print(msgspec.json.encode(Ready('float', 'resident', 1, 8)).decode(), flush=True)\n"
        'sys.stdin.readline(); print(\'{"type":"phase","phase":"answer"}\', flush=True)\n'
        "block = bytearray(b'x') * (1 << 31)\n"
    )
    job = msgspec.structs.replace(classifier.job(), cap_bytes=128 * MIB)
    with InferenceSession.start(
        job, lambda cap: launch_worker(cap, [sys.executable, "-c", greedy])
    ) as worker:
        if worker.enforced_by == "rlimit":
            pytest.skip("a program that raises MemoryError itself reports it otherwise")
        with pytest.raises(OutOfMemoryError) as killed:
            worker.classify("good")
        assert killed.value.phase == "answer"
        assert not worker.alive


def test_a_worker_that_ends_in_between_is_noticed(classifier: Model) -> None:
    """The next request says how it ended, and closing it afterwards is harmless."""
    worker = InferenceSession.start(classifier.job())
    worker._worker.process.kill()
    with pytest.raises(WorkerError, match="SIGKILL"):
        worker.classify("good")
    worker.close()
    worker.close()


def test_no_torch_is_loaded(classifier: Model) -> None:
    """The worker's memory maps hold no library of torch, and no file of it is opened."""
    with InferenceSession.start(classifier.job()) as worker:
        worker.classify("good")
        maps = Path(f"/proc/{worker._worker.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "torch" not in maps
