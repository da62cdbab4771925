"""Families as people bring them: situations from public reports, each with siblings.

A row names the public thread that reports its situation; the models are tiny and random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import TaskKind
from export.lowering.trace import ProgramKind, trace
from export.model.folder import check_model_folder
from export.model.load import load_model
from export.model.slices import ALL_LINEAR, SliceOptions
from export.quantisation.stored import StoredModel, store

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "vocab_size": 60,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
RELATIVE = {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
#: Family, task, configuration, default targets, public thread.
TARGETS: tuple[tuple[str, TaskKind, dict[str, Any], tuple[str, ...], str], ...] = (
    ("mpnet", "classification", SIZES, ("attention.attn.q", "attention.attn.v"), "huggingface/peft#318"),
    ("modernbert", "classification", SIZES, ("attn.Wqkv",), "vllm-project/vllm#57002"),
    ("phi3", "causal_lm", GROUPED, ("self_attn.qkv_proj",), "hiyouga/LlamaFactory#4020"),
    (
        "deberta-v2",
        "classification",
        {**RELATIVE, "share_att_key": True},
        ("attention.self.query_proj", "attention.self.value_proj"),
        "huggingface/transformers#18199",
    ),
    # Siblings: other fused names, a fused layer with position layers beside it, queries and keys with norms between.
    ("gpt_neox", "causal_lm", SIZES, ("attention.query_key_value",), "ShishirPatil/gorilla#35"),
    ("falcon", "causal_lm", SIZES, ("self_attention.query_key_value",), "DLYuanGod/TinyGPT-V#9"),
    ("gpt_bigcode", "causal_lm", SIZES, ("attn.c_attn",), "huggingface/peft#735"),
    ("deberta", "classification", RELATIVE, ("attention.self.in_proj",), "hiyouga/LlamaFactory#1785"),
    ("phi", "causal_lm", GROUPED, ("self_attn.q_proj", "self_attn.v_proj"), "huggingface/peft#1375"),
    (
        "gemma3_text",
        "causal_lm",
        {**GROUPED, "head_dim": 16},
        ("self_attn.q_proj", "self_attn.v_proj"),
        "ludwig-ai/ludwig#3936",
    ),
    ("eurobert", "classification", GROUPED, ("self_attn.q_proj", "self_attn.v_proj"), "none found"),
    (
        "esm",
        "classification",
        {**SIZES, "position_embedding_type": "rotary"},
        ("attention.self.query", "attention.self.value"),
        "none found",
    ),
)


def save(folder: Path, family: str, task: TaskKind, config: dict[str, Any]) -> Path:
    """A random model of a family, without tokenizer."""
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"), 0)
    kind = AutoModelForCausalLM if task == "causal_lm" else AutoModel
    kind.from_config(AutoConfig.for_model(family, **config, **ends)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "task", "config", "targets", "thread"), TARGETS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_default_targets_are_found(
    tmp_path: Path, family: str, task: TaskKind, config: dict[str, Any], targets: tuple[str, ...], thread: str
) -> None:
    """Without --targets each block gets its query and value, or the layer that makes both, whatever they are called."""
    assert "#" in thread or thread == "none found"
    folder = save(tmp_path / family, family, task, config)
    model = load_model(folder, 3 if task == "classification" else 0, SliceOptions(), task)
    blocks = model.blocks.removeprefix("encoder.")
    found = {path.removeprefix(f"{blocks}.").partition(".")[2] for path in model.sliced}
    assert found == set(targets)
    assert len(model.sliced) == 2 * len(targets)


def test_all_linear_is_every_linear_layer_of_the_blocks(tmp_path: Path) -> None:
    """As in peft, without the output layer (philschmid/deep-learning-pytorch-huggingface#43)."""
    folder = save(tmp_path / "llama", "llama", "causal_lm", GROUPED)
    model = load_model(folder, 0, SliceOptions(targets=(ALL_LINEAR,)), "causal_lm")
    assert len(model.sliced) == 2 * 7
    assert {name.rpartition(".")[2] for name in model.sliced} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


def test_all_linear_beside_a_name_is_refused(tmp_path: Path) -> None:
    """It is a word of its own, not one name of several (foundation-model-stack/fms-acceleration#81)."""
    folder = save(tmp_path / "bert", "bert", "classification", SIZES)
    with pytest.raises(ModelError, match="'all-linear' stands alone"):
        load_model(folder, 3, SliceOptions(targets=(ALL_LINEAR, "query")))


def test_blocks_without_attention_name_their_layers(tmp_path: Path) -> None:
    """FNet mixes tokens by Fourier transforms: no default, and the layers that --targets may name (none found)."""
    config = {key: value for key, value in SIZES.items() if key != "num_attention_heads"}
    folder = save(tmp_path / "fnet", "fnet", "classification", config)
    with pytest.raises(ModelError, match=r"name --targets, of intermediate\.dense, output\.dense"):
        load_model(folder, 3, SliceOptions())
    model = load_model(folder, 3, SliceOptions(targets=("intermediate.dense",)))
    assert len(model.sliced) == 2


#: Family, what its configuration is given, what the refusal says, public thread.
REFUSED: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("t5", {}, "an encoder with a decoder", "huggingface/optimum#367"),
    ("bart", {}, "an encoder with a decoder", "huggingface/transformers#7838"),
    ("marian", {}, "an encoder with a decoder", "huggingface/transformers#7838"),
    ("whisper", {}, "an encoder with a decoder", "huggingface/peft#660"),
    ("mamba", {}, "a recurrent or state space model", "state-spaces/mamba#200"),
    ("mamba2", {}, "a recurrent or state space model", "pytorch/pytorch#130150"),
    ("falcon_h1", {}, "a recurrent or state space model", "none found"),
    ("mixtral", {}, "a mixture of experts (num_local_experts is 8)", "pytorch/pytorch#130274"),
    ("qwen3_moe", {}, "a mixture of experts", "huggingface/transformers#38518"),
    ("gpt_oss", {}, "a mixture of experts", "huggingface/optimum#1671"),
    ("clip", {}, "a model of images or sound (vision_config)", "huggingface/optimum#1751"),
    ("vit", {}, "a model of images or sound (image_size)", "none found"),
    ("wav2vec2", {}, "a model of images or sound (conv_dim)", "none found"),
    ("gemma3", {}, "a model of images or sound (vision_config)", "huggingface/optimum-onnx#50"),
)


@pytest.mark.parametrize(
    ("family", "config", "expected", "thread"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_cannot_be_exported_is_told_from_its_configuration(
    tmp_path: Path, family: str, config: dict[str, Any], expected: str, thread: str
) -> None:
    """A configuration as transformers writes it is enough: nothing else is in the folder, or asked for."""
    assert "#" in thread or thread == "none found"
    AutoConfig.for_model(family, **config).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        check_model_folder(tmp_path, ())
    assert f"describes {family}, {expected}" in str(caught.value)


def test_a_configuration_without_model_type_is_told_and_the_way_out_works(tmp_path: Path) -> None:
    """An old folder names no architecture (huggingface/transformers#42381); saved again by its class it does."""
    (tmp_path / "config.json").write_text('{"hidden_size": 32, "vocab_size": 60}')
    with pytest.raises(
        ModelError, match=r"has no model_type.*save the model with transformers' save_pretrained"
    ):
        check_model_folder(tmp_path, ())
    BertConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no weights"):  # the next thing that is missing
        check_model_folder(tmp_path, ())


@pytest.mark.parametrize("kind", ["qwen99", "hunyuan_v9_dense", "../bert"])  # Tencent-Hunyuan/Hunyuan-7B#3
def test_an_architecture_of_a_later_transformers_is_told(tmp_path: Path, kind: str) -> None:
    """A model_type that the installed transformers does not know is named with both versions."""
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}", "transformers_version": "9.0.0"}}')
    with pytest.raises(
        ModelError, match=r"does not know \(the folder was saved by 9\.0\.0\); install a newer"
    ):
        check_model_folder(tmp_path, ())


def traced(stored: StoredModel, limit: int) -> list[str]:
    """Trace what an export would, of blocks and head; the names of the programs."""
    behind, names = False, []
    for segment in stored.segments[1:]:
        kinds: list[ProgramKind] = (["entry"] if segment.slices and segment.name != "head" else []) + (
            ["dual"] if behind else []
        )
        behind = behind or bool(segment.slices)
        for kind in kinds:
            trace(segment, kind, stored.shapes, limit)
            names.append(f"{segment.name}.{kind}")
    return names


def test_an_operator_without_rule_leaves_the_way_that_its_message_names(tmp_path: Path) -> None:
    """Mish has no rule; slices behind it in the last block alone never meet it (huggingface/optimum#1692)."""
    folder = save(
        tmp_path / "mish", "bert", "classification", {**SIZES, "num_hidden_layers": 1, "hidden_act": "mish"}
    )
    model = load_model(folder, 3, SliceOptions(targets=("layer.0.output.dense",)))
    assert traced(store(model, "none"), model.position_limit) == ["block_0.entry", "head.dual"]
