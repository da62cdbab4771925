"""Texts on their way out: pieces, stop strings, stop tokens, limits."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edge_runtime.data.batches import Tokenizer
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import DataError, PackageError
from edge_runtime.execution.decoder import Decoder
from edge_runtime.execution.prepare import prepare
from edge_runtime.inference.generate import StopStrings, generate
from edge_runtime.inference.requests import Finished, GenerateText, Piece, Sampling
from edge_runtime.memory.plan import Planner, Work
from edge_runtime.package.manifest import Generation
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.bigram import CORE, HIDDEN, WORDS, Bigram, write_bigram

LIMIT = 16


@pytest.fixture(scope="module")
def bigram(tmp_path_factory) -> Bigram:
    """A language model that was written by hand: the next token depends on the last one alone."""
    return write_bigram(tmp_path_factory.mktemp("bigram") / "package", generate_key())


@pytest.fixture(scope="module")
def decoder(bigram, tmp_path_factory) -> Decoder:
    """Its decode programs."""
    engine = OnnxEngine()
    folder = tmp_path_factory.mktemp("prepared") / "package"
    return Decoder(prepare(bigram.package, folder, engine, "float"), engine)


@pytest.fixture
def tokenizer(bigram) -> Tokenizer:
    """Words, as the package has them."""
    return Tokenizer(bigram.package.path("tokenizer.json"), LIMIT)


def values() -> dict[str, np.ndarray]:
    """A slice value away from zero."""
    return {CORE: np.random.default_rng(8).normal(0, 0.2, (1, HIDDEN, HIDDEN)).astype(np.float32)}


def expected_words(bigram: Bigram, last: str, count: int) -> list[str]:
    """The most probable words after one, by the formula that the package was made of."""
    found = []
    token = WORDS.index(last)
    for _ in range(count):
        e = bigram.embedding[token]
        token = int(((e + e @ values()[CORE][0]) @ bigram.output).argmax())
        found.append(WORDS[token])
    return found


def run(decoder: Decoder, tokenizer: Tokenizer, text: str, **sampling: object) -> tuple[str, Finished]:
    """The whole text, and how it ended."""
    request = GenerateText(text, Sampling(**sampling))
    *pieces, end = generate(decoder, tokenizer, values(), request, LIMIT)
    assert isinstance(end, Finished)
    assert all(isinstance(piece, Piece) and piece.text for piece in pieces)
    return "".join(piece.text for piece in pieces), end


def test_the_most_probable_words_follow(bigram, decoder, tokenizer) -> None:
    """Greedy words are those of the model's own formula, one pass a token."""
    text, end = run(decoder, tokenizer, "the cat sat", max_tokens=5)
    assert text.split() == expected_words(bigram, "sat", 5)
    assert (end.reason, end.prompt_tokens, end.tokens) == ("length", 3, 5)
    assert decoder.seen == 3 + 4  # nobody needs the keys of the last one


def test_the_package_limits_prompt_and_text_together(decoder, tokenizer) -> None:
    """Without a number of tokens the text goes on until both fill the package's limit."""
    _, end = run(decoder, tokenizer, "the dog ran home")
    assert (end.reason, end.prompt_tokens + end.tokens) == ("length", LIMIT)


@pytest.mark.parametrize("words", [LIMIT, LIMIT + 5])
def test_a_text_that_leaves_no_room_is_refused(decoder, tokenizer, words: int) -> None:
    """A prompt as long as the limit gets one line that quotes nothing of it."""
    with pytest.raises(DataError, match="has 16 tokens or more") as refused:
        run(decoder, tokenizer, " ".join(["home"] * words))
    assert "home" not in str(refused.value)


def test_a_stop_token_ends_the_text(bigram, decoder, tokenizer, monkeypatch) -> None:
    """The token itself is not part of the text; after a prompt the tokenizer's own end is taken off."""
    first, second = expected_words(bigram, "sat", 2)
    assert first != second
    stop = Generation(1, HIDDEN, HIDDEN, (WORDS.index(second),))
    monkeypatch.setattr(decoder, "manifest", msgspec.structs.replace(decoder.manifest, generation=stop))
    text, end = run(decoder, tokenizer, "the cat sat")
    assert (text.split(), end.reason, end.tokens) == ([first], "stop_token", 1)
    other = next(word for word in WORDS[2:] if word != second)
    _, end = run(decoder, tokenizer, f"{other} {other} {second}", max_tokens=1)
    assert end.prompt_tokens == 2


def test_a_stop_string_ends_the_text_before_it(bigram, decoder, tokenizer) -> None:
    """What came before the string goes out, the string and what follows do not."""
    words = expected_words(bigram, "sat", 8)
    wanted = words[2]
    text, end = run(decoder, tokenizer, "the cat sat", stop=(wanted,))
    assert (text.split(), end.reason) == (words[: words.index(wanted)], "stop_string")


def test_who_is_told_to_stop_stops(decoder, tokenizer) -> None:
    """The text ends before the next token once somebody says so."""
    asked = iter([False, False, True])
    request = GenerateText("the cat sat")
    *pieces, end = generate(decoder, tokenizer, values(), request, LIMIT, lambda: next(asked))
    assert (len(pieces), end.reason, end.tokens) == (2, "stopped", 2)


def test_a_package_without_decode_programs_says_what_to_do(bigram, tmp_path) -> None:
    """Planning and loading name the option of the export."""
    manifest = bigram.package.manifest
    plain = msgspec.structs.replace(
        manifest,
        generation=None,
        segments=tuple(msgspec.structs.replace(each, decode=None) for each in manifest.segments),
    )
    with pytest.raises(PackageError, match="export it again with --with-generation"):
        Planner(plain).choose(Work(1, LIMIT, 0, (), generates=True), 1 << 30)
    prepared = prepare(bigram.package, tmp_path / "prepared", OnnxEngine(), "float")
    with pytest.raises(PackageError, match="export it again with --with-generation"):
        Decoder(_with_manifest(prepared, plain), OnnxEngine())


def _with_manifest(prepared, manifest):
    prepared.manifest = manifest
    return prepared


def test_the_cache_is_planned_for(bigram) -> None:
    """A longer text is predicted to take more, by what its keys and values take in all blocks."""

    def waiting(tokens: int) -> int:
        work = Work(1, tokens, 0, (), keeps_tokenizer=True, generates=True)
        planner = Planner(bigram.package.manifest)
        return planner.predict(work, next(planner.choices(work))).waiting_bytes

    # of each token: a key and a value of 6 numbers in one block and in 2 copies of it, the hidden state of 6, a label,
    # and what the masks of T x T grow by
    grown = waiting(12) - waiting(8)
    assert grown == 4 * ((6 + 6) * 4 * 3 + 6 * 4 + 8) + 4 * (12 * 12 - 8 * 8)


def passed(stops: tuple[str, ...], *texts: str) -> tuple[list[str], bool]:
    """What goes out for each text, the rest last."""
    filtered = StopStrings(stops)
    out = [filtered.passed(text) for text in texts]
    return [*out, filtered.rest()], filtered.met


def test_what_may_begin_a_stop_string_waits() -> None:
    """A beginning is held back until it is one or is not; at the end it goes out."""
    assert passed(("\n\n",), "a\n", "b\n", "\nc") == (["a", "\nb", "", ""], True)
    assert passed(("\n\n",), "a\n") == (["a", "\n"], False)
    assert passed(("END", "STOP"), "E", "N", "S", "T", "x") == (["", "", "EN", "", "STx", ""], False)


def test_the_first_of_several_stop_strings_ends_it() -> None:
    """Whichever comes first in the text, not in the list."""
    assert passed(("dog", "cat"), "a cat, a dog") == (["a ", ""], True)
    assert passed((), "all ", "of it") == (["all ", "of it", ""], False)
