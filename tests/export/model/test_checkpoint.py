"""Tensors of a model folder under the names of a model, whatever files hold them and whatever they call them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTForCausalLM,
    PreTrainedModel,
)

from edge_runtime.errors import ModelError
from export.capture.record import capture
from export.model.checkpoint import Checkpoint
from export.model.load import load_model
from export.model.slices import SliceOptions, factors
from tests.export import tiny

SMALL = {"vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


def save(model: PreTrainedModel, folder: Path, how: str) -> Path:
    """Save as one safetensors file, in shards, or as transformers did before safetensors."""
    if how == "sharded":
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif how == "pickled":
        model.save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["whole", "sharded", "pickled"])
def test_every_tensor_is_read_as_transformers_reads_it(tmp_path, how: str) -> None:
    """From each kind of weight file, a decoder's tensors come bit for bit, in float32, under the model's names."""
    config = tiny.small_config("llama", vocab_size=40)
    model = LlamaForCausalLM(config).half()
    folder = save(model, tmp_path / "model", how)
    checkpoint = Checkpoint(folder, model)
    for name, parameter in model.named_parameters():
        assert name in checkpoint
        found = checkpoint.tensor(name)
        assert found.dtype == torch.float32
        assert torch.equal(found, parameter.detach().float())


def test_an_encoder_saved_with_a_head_is_read_without_it(tmp_path) -> None:
    """A folder of BertForMaskedLM names tensors bert.…; the encoder's own names find them."""
    config = BertConfig(**SMALL, intermediate_size=48)
    model = BertForMaskedLM(config)
    folder = save(model, tmp_path / "model", "whole")
    loaded = load_model(folder, 2, SliceOptions(targets=("query",), rank=2))
    name = "encoder.encoder.layer.1.attention.self.query.linear.weight"
    expected = model.bert.encoder.layer[1].attention.self.query.weight.detach()
    assert torch.equal(loaded.tensor(name), expected)


def test_transposed_and_tied_matrices_come_as_the_captured_model_uses_them(tmp_path) -> None:
    """GPT-2 keeps its matrices (inputs, outputs) and shares the embedding with the output layer, stored once."""
    model = GPT2LMHeadModel(tiny.small_config("gpt2", vocab_size=40))
    folder = save(model, tmp_path / "model", "sharded")
    loaded = load_model(folder, 0, SliceOptions(rank=2), "causal_lm")
    stored = model.transformer.h[0].attn.c_attn.weight.detach()
    assert torch.equal(loaded.tensor("encoder.transformer.h.0.attn.c_attn.linear.weight"), stored.T)
    embedding = model.transformer.wte.weight.detach()
    assert torch.equal(loaded.tensor("encoder.transformer.wte.weight"), embedding)
    assert torch.equal(loaded.tensor("encoder.lm_head.weight"), embedding)


def test_a_loaded_model_has_no_values_until_it_is_asked(tmp_path) -> None:
    """Frozen parameters take no memory; materialised, the model gives what transformers gives."""
    config = tiny.small_config("llama", vocab_size=40)
    model = LlamaForCausalLM(config).eval()
    folder = save(model, tmp_path / "model", "whole")
    loaded = load_model(folder, 0, SliceOptions(), "causal_lm")
    frozen = [p for name, p in loaded.module.named_parameters() if name.rsplit(".", 1)[-1] != "core"]
    assert all(parameter.is_meta for parameter in frozen)
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = loaded.materialise().encoder(ids).logits
        torch.testing.assert_close(got, model(ids).logits)


def test_weights_of_another_architecture_are_missing(tmp_path) -> None:
    """A folder whose weights lack a block is refused, with how many tensors are missing and the first of them."""
    model = LlamaForCausalLM(tiny.small_config("llama", vocab_size=40, num_hidden_layers=1))
    folder = save(model, tmp_path / "model", "whole")
    tiny.small_config("llama", vocab_size=40).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"lacks 9 tensors .* the first is model\.layers\.1\."):
        load_model(folder, 0, SliceOptions(), "causal_lm")


def test_an_encoder_cannot_predict_the_next_token(tmp_path) -> None:
    """A model whose attention looks ahead is refused for language modelling, with what to do."""
    folder = save(BertForMaskedLM(BertConfig(**SMALL, intermediate_size=48)), tmp_path / "model", "whole")
    with pytest.raises(ModelError, match="choose a decoder, or --task classification"):
        load_model(folder, 0, SliceOptions(), "causal_lm")


def test_a_layer_without_an_axis_of_examples_takes_no_slice(tmp_path) -> None:
    """OPT joins examples and tokens before its feed-forward layers: refused, with what to choose instead."""
    model = OPTForCausalLM(tiny.small_config("opt", vocab_size=40))
    folder = save(model, tmp_path / "model", "whole")
    loaded = load_model(folder, 0, SliceOptions(targets=("fc1",)), "causal_lm")
    with pytest.raises(ModelError, match="choose other --targets"):
        capture(loaded)


def test_leading_factors_of_a_large_matrix_are_the_exact_ones() -> None:
    """Where the decomposition is iterated, up and down are orthogonal as before and make the best approximation."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(1100, 40, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(1200, 40, generator=generator))
    weight = (left * torch.logspace(1, -1, 40)) @ right.T
    up, down = factors(weight, 4, 1.0)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (u[:, :4] * s[:4]) @ v[:4]
    torch.testing.assert_close(up @ down, best.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(down @ down.T, torch.eye(4), rtol=1e-4, atol=1e-4)
