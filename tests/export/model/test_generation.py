"""Decode programs: token by token they give what transformers gives in one pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import ModelError
from edge_runtime.execution.decoder import Decoder
from edge_runtime.package.prepared import PreparedPackage
from export.cli import main
from export.model.generation import cache_shape, stop_tokens
from tests.export import peft_models, tiny

PROMPT = (7, 21, 5, 33, 12, 9, 40, 3, 18)
NEW = 12


@pytest.fixture(scope="module")
def decoder_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral of two blocks, whose attention sees a window of 6 tokens."""
    return tiny.write_model(tmp_path_factory.mktemp("model") / "mistral", "mistral", "causal_lm")


@pytest.fixture(scope="module")
def exported_decoder(decoder_model: Path) -> tiny.Exported:
    """Its float package with decode programs."""
    return tiny.export_shared(
        decoder_model, quantisation="none", task="causal_lm", labels=(), with_generation=True
    )


def test_greedy_tokens_are_those_of_transformers(exported_decoder, decoder_model: Path) -> None:
    """Prompt and twelve tokens, past the window of the attention: logits within 1e-4, and the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(decoder_model, attn_implementation="eager").eval()
    with torch.no_grad():
        done = model.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    package = exported_decoder.package
    decoder = Decoder(PreparedPackage.as_stored(package), OnnxEngine(threads=1))
    values = peft_models.initial(package)
    given, found = list(PROMPT), []
    for expected in done.logits:
        logits = decoder.next_logits(values, given)
        np.testing.assert_allclose(logits, expected[0].numpy(), atol=1e-4)
        found.append(int(expected[0].argmax()))
        given = [found[-1]]
    assert found == done.sequences[0, len(PROMPT) :].tolist()
    assert decoder.seen == len(PROMPT) + NEW - 1


def test_the_manifest_says_what_is_cached(exported_decoder, decoder_model: Path) -> None:
    """Shapes of keys and values, stop tokens as the folder states them, and a program for each segment."""
    manifest = exported_decoder.package.manifest
    config = json.loads((decoder_model / "config.json").read_text())
    assert (manifest.generation.heads, manifest.generation.key_size, manifest.generation.value_size) == (
        2,
        16,
        16,
    )
    assert manifest.generation.stop_token_ids == (config["eos_token_id"],)
    assert len({segment.decode for segment in manifest.segments}) == 3  # both blocks share one


class _Forgetful(torch.nn.Module):
    """A model that takes a cache and keeps nothing in it."""

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return input_ids


class _Uncached(torch.nn.Module):
    """A model that knows of no cache."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids * attention_mask


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_Uncached(), "does not generate from cached keys and values"),
        (_Forgetful(), "does not keep keys and values of one shape in every block"),
    ],
)
def test_other_models_are_refused(model: torch.nn.Module, message: str) -> None:
    """A model that keeps no keys and values is named as such."""
    with pytest.raises(ModelError, match=message):
        cache_shape(model, {}, FakeTensorMode(allow_non_fake_inputs=True))


def test_a_classifier_does_not_generate(tmp_path: Path, capsys) -> None:
    """The option with ``--labels`` ends at once, with what to do."""
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "label": "good"}\n')
    (tmp_path / "labels.json").write_text(json.dumps(tiny.LABELS))
    words = ("package", tmp_path, "--labels", tmp_path / "labels.json", "--output", tmp_path / "package")
    options = ("--check-data", tmp_path / "rows.jsonl", "--key", tmp_path / "key", "--with-generation")
    assert main([*map(str, words), *map(str, options)]) == 11
    assert "--with-generation is for --task causal_lm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 1, 3]}, {"eos_token_id": 2}, (3, 1)),
        ({}, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": None}, ()),
        ({"eos_token_id": 500}, {"eos_token_id": -1}, ()),
    ],
)
def test_stop_tokens_come_from_the_folder(
    tmp_path: Path, generation: dict | None, config: dict, expected: tuple[int, ...]
) -> None:
    """What generation_config.json states comes first; ids outside the vocabulary are none."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(tmp_path, 96) == expected
