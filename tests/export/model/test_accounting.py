"""Tensors of a folder that the model does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from edge_runtime.errors import ModelError
from export.model.accounting import account
from export.model.checkpoint import Checkpoint
from tests.export import tiny

SMALL = {
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def accounted(saved: PreTrainedModel, folder: Path, read: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What is said of a saved model's tensors when its base alone is exported."""
    saved.save_pretrained(folder)
    base = AutoModel.from_config(saved.config)
    return account(folder, base, Checkpoint(folder, base), read)


def change(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(
        load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertForPreTraining(BertConfig(**SMALL)),
        lambda: RobertaForMaskedLM(RobertaConfig(**SMALL)),
        lambda: GPT2LMHeadModel(tiny.small_config("gpt2", vocab_size=40, tie_word_embeddings=False)),
    ],
    ids=["bert", "roberta", "gpt2"],
)
def test_pretraining_heads_are_known(tmp_path: Path, make) -> None:
    """The heads that a base model was pre-trained with are not worth a sentence."""
    assert accounted(make(), tmp_path) == ()


def test_other_heads_are_named_unless_they_are_read(tmp_path: Path) -> None:
    """A classifier's head is named; what is read of it is not."""
    model = BertForSequenceClassification(BertConfig(**SMALL))
    expected = "2 tensors of the folder are not used: classifier.bias, classifier.weight"
    assert accounted(model, tmp_path) == (expected,)
    assert accounted(model, tmp_path, ("classifier.weight",)) == (
        "1 tensor of the folder is not used: classifier.bias",
    )


def test_masks_of_older_releases_are_known(tmp_path: Path) -> None:
    """GPT-2 used to save its causal masks."""
    model = GPT2LMHeadModel(tiny.small_config("gpt2", vocab_size=40))
    model.save_pretrained(tmp_path)
    change(
        tmp_path,
        **{"transformer.h.0.attn.bias": torch.ones(4), "transformer.h.1.attn.masked_bias": torch.ones(())},
    )
    base = AutoModel.from_config(model.config)
    assert account(tmp_path, base, Checkpoint(tmp_path, base)) == ()


def test_a_type_that_is_no_float_is_refused(tmp_path: Path) -> None:
    """A parameter in whole numbers is named with its type."""
    model = BertForSequenceClassification(BertConfig(**SMALL))
    model.save_pretrained(tmp_path)
    change(tmp_path, **{"bert.encoder.layer.0.output.dense.bias": torch.ones(32, dtype=torch.int32)})
    base = AutoModel.from_config(model.config)
    with pytest.raises(
        ModelError, match=r"encoder\.layer\.0\.output\.dense\.bias in I32, which is no float type"
    ):
        account(tmp_path, base, Checkpoint(tmp_path, base))


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("max_position_embeddings", 99, r"position_embeddings\.weight"),
        ("type_vocab_size", 5, r"token_type_embeddings\.weight"),
        ("vocab_size", 41, r"word_embeddings\.weight"),
    ],
)
def test_the_key_that_contradicts_a_shape_is_named(tmp_path: Path, key: str, value: int, tensor: str) -> None:
    """A tensor of another shape names the tensor, both shapes and the key of config.json."""
    model = BertForSequenceClassification(BertConfig(**SMALL))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_config(BertConfig(**{**SMALL, key: value}))
    with pytest.raises(
        ModelError, match=rf"{tensor} as \[\d+, 32\].* makes it \[{value}, 32\]; correct {key} "
    ):
        account(tmp_path, base, Checkpoint(tmp_path, base))
