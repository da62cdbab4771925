"""Cached keys and values: how a text is cut into passes changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

import edge_runtime.execution.decoder as decoder_module
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.decoder import Decoder
from edge_runtime.execution.prepare import prepare
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.bigram import CORE, HIDDEN, write_bigram

IDS = (2, 3, 5, 4, 6, 7, 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> PreparedPackage:
    """The language model that was written by hand."""
    bigram = write_bigram(tmp_path_factory.mktemp("bigram") / "package", generate_key())
    return prepare(bigram.package, tmp_path_factory.mktemp("prepared") / "package", OnnxEngine(), "float")


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("at_a_time", [1, 3, 64])
def test_passes_of_any_size_give_the_same_logits(prepared, monkeypatch, weights: str, at_a_time: int) -> None:
    """A prompt in one pass, in several, or token by token ends in the same logits and the same cache."""
    values = {CORE: np.full((1, HIDDEN, HIDDEN), 0.1, np.float32)}
    monkeypatch.setattr(decoder_module, "PROMPT_TOKENS", at_a_time)
    cut, whole = Decoder(prepared, OnnxEngine(), weights), Decoder(prepared, OnnxEngine(), weights)
    given = cut.next_logits(values, IDS)
    monkeypatch.setattr(decoder_module, "PROMPT_TOKENS", 64)
    np.testing.assert_allclose(given, whole.next_logits(values, IDS), atol=1e-6)
    assert cut.seen == whole.seen == len(IDS)
    for ours, theirs in zip(cut._kept, whole._kept, strict=True):
        assert ours[0].shape == (1, 1, len(IDS), HIDDEN)
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)


def test_another_text_starts_with_nothing(prepared) -> None:
    """After forgetting, the logits are those of a fresh decoder."""
    values = {CORE: np.zeros((1, HIDDEN, HIDDEN), np.float32)}
    decoder = Decoder(prepared, OnnxEngine())
    first = decoder.next_logits(values, IDS)
    decoder.next_logits(values, IDS[:2])
    decoder.forget()
    assert decoder.seen == 0
    np.testing.assert_array_equal(decoder.next_logits(values, IDS), first)
