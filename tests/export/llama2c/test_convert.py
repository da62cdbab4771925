"""llama2.c checkpoints, against its forward pass and its greedy merge, both written again here."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import ModelError
from edge_runtime.execution.prepare import prepare
from edge_runtime.package.slices import decode_values, encode_values
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome, TrainJob, TrainOutcome
from edge_runtime.worker.process import run_worker
from export.cli import main
from export.llama2c.convert import HEADER, convert, read_checkpoint
from export.llama2c.tokenizer import BEGIN, FIRST_BYTE, FIRST_TEXT, MAX_TOKEN_BYTES
from tests.export import tiny

DIM, INNER, LAYERS, HEADS, GROUPS, LENGTH = 16, 24, 2, 4, 2, 32
SIZE = DIM // HEADS
#: Texts after the bytes, best merges first; then single characters, as sentencepiece orders them.
PIECES = (" t", "he", " a", "aa", " the", "at", " cat", "aaaa", "aaa", "ca", "é!")
CHARACTERS = " ehtacnñé!"
VOCABULARY = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{i:02X}>".encode() for i in range(256))]
VOCABULARY += [text.encode() for text in (*PIECES, *CHARACTERS)]
SCORES = [0.0] * FIRST_TEXT + [-float(i) for i in range(len(PIECES) + len(CHARACTERS))]
STORIES = os.environ.get("EDGE_STORIES260K", "")


def tensors(shared: bool) -> list[np.ndarray]:
    """Random tensors in llama2.c's order, the rotary tables among them."""
    generator = np.random.default_rng(2)
    vocabulary, keys = len(VOCABULARY), GROUPS * SIZE
    angles = np.arange(LENGTH)[:, None] / 10000.0 ** (np.arange(0, SIZE, 2) / SIZE)
    shapes = [
        (vocabulary, DIM), (LAYERS, DIM), (LAYERS, DIM, DIM), (LAYERS, keys, DIM), (LAYERS, keys, DIM),
        (LAYERS, DIM, DIM), (LAYERS, DIM), (LAYERS, INNER, DIM), (LAYERS, DIM, INNER), (LAYERS, INNER, DIM), (DIM,),
    ]  # fmt: skip
    drawn = [generator.normal(0, 0.5, shape) for shape in shapes]
    drawn += [np.cos(angles), np.sin(angles)]
    if not shared:
        drawn.append(generator.normal(0, 0.5, (vocabulary, DIM)))
    return [tensor.astype(np.float32) for tensor in drawn]


def write_checkpoint(path: Path, shared: bool = True, **changes: int) -> Path:
    """A checkpoint as llama2.c writes it; ``changes`` replace numbers of the header."""
    numbers = {
        "dim": DIM, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": GROUPS,
        "vocab_size": len(VOCABULARY) * (1 if shared else -1), "max_seq_len": LENGTH, **changes,
    }  # fmt: skip
    data = b"".join(tensor.astype("<f4").tobytes() for tensor in tensors(shared))
    path.write_bytes(HEADER.pack(*numbers.values()) + data)
    return path


def write_tokenizer(
    path: Path, vocabulary: list[bytes] | None = None, scores: list[float] | None = None
) -> Path:
    """A tokenizer file as llama2.c writes it."""
    entries = zip(vocabulary or VOCABULARY, scores or SCORES, strict=True)
    path.write_bytes(
        struct.pack("<i", 7)
        + b"".join(struct.pack("<fi", score, len(text)) + text for text, score in entries)
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny checkpoint as a Hugging Face folder, by the command."""
    work = tmp_path_factory.mktemp("llama2c")
    checkpoint, tokenizer = write_checkpoint(work / "tiny.bin"), write_tokenizer(work / "tok.bin")
    assert main(["llama2c", str(checkpoint), str(tokenizer), "--output", str(work / "model")]) == 0
    assert sorted(path.name for path in work.iterdir()) == ["model", "tiny.bin", "tok.bin"]
    return work / "model"


def forward(ids: list[int], shared: bool) -> np.ndarray:
    """Logits (T, V) by llama2.c's forward pass: a token at a time, keys and values kept, neighbours rotated."""
    emb, att, wq, wk, wv, wo, ffn, w1, w2, w3, final, cos, sin, *rest = (
        t.astype(np.float64) for t in tensors(shared)
    )
    classifier = emb if shared else rest[0]
    kept: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(LAYERS)]
    logits = []

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def rotate(x: np.ndarray, place: int) -> np.ndarray:
        pairs = x.reshape(-1, SIZE // 2, 2)
        c, s = cos[place], sin[place]
        first, second = pairs[..., 0] * c - pairs[..., 1] * s, pairs[..., 0] * s + pairs[..., 1] * c
        return np.stack([first, second], -1).reshape(-1, SIZE)

    for place, token in enumerate(ids):
        x = emb[token]
        for layer in range(LAYERS):
            h = norm(x, att[layer])
            query, key = rotate(wq[layer] @ h, place), rotate(wk[layer] @ h, place)
            kept[layer].append((key, (wv[layer] @ h).reshape(-1, SIZE)))
            out = np.empty((HEADS, SIZE))
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = np.array([query[head] @ k[group] for k, _ in kept[layer]]) / np.sqrt(SIZE)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[head] = sum(w * v[group] for w, (_, v) in zip(weights, kept[layer], strict=True))
            x = x + wo[layer] @ out.reshape(-1)
            h = norm(x, ffn[layer])
            gate = w1[layer] @ h
            x = x + w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ h))
        logits.append(classifier @ norm(x, final))
    return np.array(logits)


def greedy(text: str, vocabulary: list[bytes], scores: list[float]) -> list[int]:
    """Token ids by llama2.c's ``encode``: a space in front, characters or bytes, then merges, leftmost first."""
    index = {piece: number for number, piece in enumerate(vocabulary)}
    ids = [index[b" "]] if text else []
    for character in text:
        data = character.encode()
        ids += [index[data]] if data in index else [byte + FIRST_BYTE for byte in data]
    while True:
        best, place, made = -1e10, -1, -1
        for i in range(len(ids) - 1):
            union = index.get(vocabulary[ids[i]] + vocabulary[ids[i + 1]])
            if union is not None and scores[union] > best:
                best, place, made = scores[union], i, union
        if place < 0:
            return [BEGIN, *ids]
        ids[place : place + 2] = [made]


@pytest.mark.parametrize("shared", [True, False])
def test_the_model_computes_what_llama2c_computes(tmp_path, shared: bool) -> None:
    """Logits of the Hugging Face model equal those of llama2.c's own forward pass, with and without a classifier."""
    checkpoint = write_checkpoint(tmp_path / "tiny.bin", shared)
    convert(checkpoint, write_tokenizer(tmp_path / "tok.bin"), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    ids = [1, 270, 5, 263, 263, 8, 277, 2]
    with torch.no_grad():
        got = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(got, forward(ids, shared), rtol=1e-5, atol=1e-6)
    assert model.config.tie_word_embeddings is shared


@given(st.text(st.sampled_from(CHARACTERS + "x\n🙂<"), max_size=24))
def test_a_text_is_encoded_as_llama2c_encodes_it(folder, text: str) -> None:
    """Runs of one letter, spaces, characters outside the vocabulary and no text at all give llama2.c's tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(text).ids == greedy(text, VOCABULARY, SCORES)


def test_tokens_come_back_as_text(folder) -> None:
    """Decoding gives the text again, bytes joined and the space in front taken off; a name is no special token."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("the cat", "  ñé🙂!", "<s>the</s>"):
        assert tokenizer.decode(tokenizer.encode(text).ids[1:]) == text
        assert tokenizer.encode(text).ids.count(BEGIN) == 1


def test_transformers_reads_the_same_tokenizer(folder) -> None:
    """What transformers loads from the folder encodes as the file does; exporting a package goes that way."""
    loaded = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "the cat at <s> aaaaaaé!"
    assert loaded.encode(text).ids == written.encode(text).ids


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dim": 0}, "dim = 0, which may be 1 to 65536"),
        ({"n_layers": -3}, "n_layers = -3"),
        ({"max_seq_len": 1 << 30}, "max_seq_len = 1073741824"),
        ({"n_heads": 5}, "do not divide"),
        ({"n_kv_heads": 3}, "do not divide"),
        ({"n_heads": DIM, "n_kv_heads": DIM}, "heads of an even size"),
        ({"n_layers": 3}, "its header asks for"),
        ({"dim": 0x616B3432, "hidden_dim": 1}, "is of version 1, this reads version 0"),
    ],
)
def test_an_absurd_header_is_refused(tmp_path, changes: dict[str, int], why: str) -> None:
    """A header that cannot be meant is refused by the number in it, before any tensor is read."""
    checkpoint = write_checkpoint(tmp_path / "tiny.bin", **changes)
    with pytest.raises(ModelError, match=why):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("size", [0, 12, 28, 5000])
def test_a_truncated_checkpoint_is_refused(tmp_path, size: int) -> None:
    """A file cut off anywhere is refused with both sizes, and no folder appears."""
    checkpoint, tokenizer = write_checkpoint(tmp_path / "tiny.bin"), write_tokenizer(tmp_path / "tok.bin")
    os.truncate(checkpoint, size)
    with pytest.raises(ModelError, match=r"tiny\.bin .*(ends within its header|truncated)"):
        convert(checkpoint, tokenizer, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.bin", "tok.bin"]


def test_trailing_bytes_are_refused(tmp_path) -> None:
    """A file longer than its header says is not what it claims to be."""
    checkpoint = write_checkpoint(tmp_path / "tiny.bin")
    with checkpoint.open("ab") as file:
        file.write(b"1234")
    with pytest.raises(ModelError, match="its header asks for"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("vocabulary", "scores", "why"),
    [
        (VOCABULARY[:-1], SCORES[:-1], "do not belong together"),
        ([*VOCABULARY, b"more"], [*SCORES, -99.0], "more than the checkpoint's"),
        ([*VOCABULARY[:-1], b"the\xff"], SCORES, "is not UTF-8"),
        ([*VOCABULARY[:-1], b"aa"], SCORES, "are the same"),
        ([*VOCABULARY[:-1], b""], SCORES, "has 0 bytes"),
        ([*VOCABULARY[:-1], b"x" * (MAX_TOKEN_BYTES + 1)], SCORES, "it may have 1 to 1024"),
        (VOCABULARY, [*SCORES[:-1], float("nan")], "not finite"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, vocabulary, scores, why: str) -> None:
    """A tokenizer of another vocabulary, or a damaged one, is refused by token, and no folder appears."""
    checkpoint = write_checkpoint(tmp_path / "tiny.bin")
    tokenizer = write_tokenizer(tmp_path / "tok.bin", vocabulary, scores)
    with pytest.raises(ModelError, match=why):
        convert(checkpoint, tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_cut_off_within_a_token_is_refused(tmp_path) -> None:
    """The token that the file ends in is named."""
    checkpoint, tokenizer = write_checkpoint(tmp_path / "tiny.bin"), write_tokenizer(tmp_path / "tok.bin")
    os.truncate(tokenizer, tokenizer.stat().st_size - 1)
    with pytest.raises(ModelError, match=rf"token {len(VOCABULARY) - 1} is cut off"):
        convert(checkpoint, tokenizer, tmp_path / "model")


def test_nothing_is_overwritten(folder, tmp_path, capsys) -> None:
    """An output that exists, and a file that does not, end the command with one line and leave all as it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = [str(write_checkpoint(tmp_path / "tiny.bin")), str(write_tokenizer(tmp_path / "tok.bin"))]
    assert main(["llama2c", *files, "--output", str(folder)]) == ModelError.exit_code
    assert (
        main(["llama2c", "nowhere.bin", files[1], "--output", str(tmp_path / "model")])
        == ModelError.exit_code
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "exists already" in lines[0]
    assert "nowhere.bin" in lines[1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "model").exists()


def loss_by_hand(texts: tuple[str, ...]) -> tuple[float, int]:
    """Mean cross-entropy over all tokens that follow another, and how many there are."""
    total, tokens = 0.0, 0
    for text in texts:
        ids = greedy(text, VOCABULARY, SCORES)
        logits = forward(ids, shared=True)[:-1]
        total += float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(ids) - 1), ids[1:]]).sum())
        tokens += len(ids) - 1
    return total / tokens, tokens


def test_a_converted_checkpoint_is_evaluated_and_trained(folder, tmp_path) -> None:
    """Exported and run by a worker, it has the loss over tokens that llama2.c's forward pass gives, and learns."""
    texts = ("the cat at the cat", "a cat", "the the the at!", "aaaa cathe")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    slices = {"rank": 2, "targets": ("q_proj",)}
    changes = {"task": "causal_lm", "labels": (), "quantisation": "none", "check_texts": texts}
    package = tiny.export(folder, tmp_path / "package", **slices, **changes).package
    prepare(package, tmp_path / "prepared", OnnxEngine(), "float")
    places = (str(package.folder), package.sha256, str(tmp_path / "prepared"))
    initial, change, moved = (
        str(path) for path in (package.path("slices.safetensors"), tmp_path / "c", tmp_path / "m")
    )

    before = run_worker(EvaluateJob(*places, initial, str(rows), 32, 1 << 30), EvaluateOutcome)
    expected, tokens = loss_by_hand(texts)
    assert (before.rows, before.tokens) == (len(texts), tokens)
    assert before.mean_loss == pytest.approx(expected, rel=1e-5)

    optimizer = LocalOptimizer("sgd", 0.3)
    task = tiny.make_task(package, train_head=False, steps=20, draws=8, optimizer=optimizer)
    trained = run_worker(TrainJob(*places, initial, str(rows), change, task, 1 << 30), TrainOutcome)
    assert (trained.steps_applied, trained.steps_skipped) == (20, 0)
    old, by = (decode_values(Path(p).read_bytes(), package.manifest.slices) for p in (initial, change))
    Path(moved).write_bytes(encode_values({name: old[name] + by[name] for name in old}))
    after = run_worker(EvaluateJob(*places, moved, str(rows), 32, 1 << 30), EvaluateOutcome)
    assert after.mean_loss < before.mean_loss - 0.01


@pytest.mark.skipif(
    not STORIES, reason="EDGE_STORIES260K names no folder with stories260K.bin and tok512.bin"
)
def test_stories260k_tells_a_story(tmp_path) -> None:
    """The real checkpoint, converted and decoded greedily, begins a story in English."""
    given_in = Path(STORIES)
    convert(given_in / "stories260K.bin", given_in / "tok512.bin", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = model.generate(torch.tensor([[BEGIN]]), max_new_tokens=40, do_sample=False)[0].tolist()
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    story = tokenizer.decode(ids[1:])
    assert story.startswith("Once upon a time, there was a little girl named Lily.")
