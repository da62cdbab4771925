"""Tensors of a model folder under the names of a model, whatever files hold them and whatever they call them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTForCausalLM,
    PreTrainedModel,
)

from edge_runtime.errors import ModelError
from export.capture.record import capture
from export.model import checkpoint as checkpoint_module
from export.model.checkpoint import Checkpoint
from export.model.load import load_model
from export.slices.lora_xs import factors
from export.slices.sliced_linear import SliceOptions
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


@pytest.mark.parametrize("family", ["gte", "nomic_bert", "jina_embeddings_v3"])
@pytest.mark.parametrize("how", ["whole", "pickled"])
def test_one_stored_tensor_holds_several_of_the_model(tmp_path, family: str, how: str) -> None:
    """Query, key and value that a folder keeps as one matrix, and halves of a feed-forward layer, are read as saved."""
    torch.manual_seed(0)
    model = AutoModel.from_config(
        AutoConfig.for_model(
            family, **SMALL, intermediate_size=48, pad_token_id=0, bos_token_id=0, eos_token_id=0
        )
    )
    folder = model_folder(model, tmp_path / "model", how)
    checkpoint = Checkpoint(folder, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(checkpoint.tensor(name), parameter.detach()), name
        assert checkpoint.described(name).shape == tuple(parameter.shape)
    query = next(name for name, _ in model.named_parameters() if name.endswith("0.self_attn.q_proj.weight"))
    key = query.replace("q_proj", "k_proj")
    assert checkpoint.place(query) == checkpoint.place(key)
    assert (checkpoint.part(query), checkpoint.part(key)) == ((0, 3), (1, 3))
    assert not checkpoint.equal(query, key)
    assert len(load_model(folder, 3, SliceOptions()).sliced) == 4


def model_folder(model: PreTrainedModel, folder: Path, how: str) -> Path:
    """Save a model in the layout of its publisher, as transformers does, as safetensors or as PyTorch's file."""
    model.save_pretrained(folder)
    if how == "pickled":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


def test_a_layout_that_has_to_be_assembled_is_refused_and_the_way_out_works(tmp_path, monkeypatch) -> None:
    """Where a stored tensor is no row of equal parts, the folder that transformers saves in its own layout is taken."""
    monkeypatch.setattr(checkpoint_module, "_is_even_split", lambda converter: False)
    config = AutoConfig.for_model("gte", **SMALL, intermediate_size=48, pad_token_id=0)
    model = AutoModel.from_config(config)
    model.save_pretrained(tmp_path / "fused")
    with pytest.raises(ModelError, match=r"save_pretrained\(folder, save_original_format=False\)"):
        load_model(tmp_path / "fused", 3, SliceOptions())
    AutoModel.from_pretrained(tmp_path / "fused").save_pretrained(
        tmp_path / "own", save_original_format=False
    )
    loaded = load_model(tmp_path / "own", 3, SliceOptions())
    assert torch.equal(
        loaded.tensor("encoder.layers.0.self_attn.k_proj.weight"), model.layers[0].self_attn.k_proj.weight
    )


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
