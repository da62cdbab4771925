"""Model folders as people bring them: quantised, saved twice, wrapped, with a tokenizer of another model.

Each row rebuilds the situation of a public thread on a tiny random model. A row that is refused says so in one line.
Where its way out can be followed here, the row follows it, and the folder is accepted.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from edge_runtime.errors import EdgeError, ModelError
from edge_runtime.package.manifest import TaskKind
from edge_runtime.protocol.signing import generate_key
from export.capture.record import capture
from export.model.folder import check_model_folder
from export.model.load import LoadedModel, load_model
from export.model.slices import SliceOptions
from tests.export import tiny
from tests.shared_folders import shared_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER, SETTINGS = "config.json", "tokenizer.json", "tokenizer_config.json"
PROJECTION = "model.layers.0.self_attn.q_proj"

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Row:
    """A situation.

    Attributes:
        name: what somebody brings.
        thread: public report of it, or "none found".
        damage: change of a good folder into the situation.
        says: what the message, or the note, must match.
        mend: way out that the message names; None where it needs what is not installed here.
        model: good folder to start from.
    """

    name: str
    thread: str
    damage: Change
    says: str
    mend: Change | None = None
    model: str = "decoder"


def edit(file: str, **changes: object) -> Change:
    """Set keys of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        path = folder / file
        found = json.loads(path.read_text()) if path.exists() else {}
        kept = {key: value for key, value in (found | changes).items() if value is not None}
        path.write_text(json.dumps(kept))

    return change


def tensors(rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    """Rewrite the tensors of a folder."""

    def change(folder: Path) -> None:
        save_file(rewrite(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return change


def put(**added: Tensor) -> Change:
    """Add tensors; dots in a name are written as two underscores."""
    return tensors(lambda found: found | {name.replace("__", "."): tensor for name, tensor in added.items()})


def drop(pattern: str) -> Change:
    """Remove tensors whose names match."""
    return tensors(lambda found: {name: t for name, t in found.items() if not re.search(pattern, name)})


def rename(pattern: str, replacement: str) -> Change:
    """Give tensors other names."""
    return tensors(lambda found: {re.sub(pattern, replacement, name): t for name, t in found.items()})


def write(file: str, data: bytes = b"x") -> Change:
    """Put a file there."""

    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(data)

    return change


def remove(*files: str) -> Change:
    """Remove files."""

    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def each(*changes: Change) -> Change:
    """Several changes, in order."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def shard(size: str = "60KB") -> Change:
    """Save the folder's model again, in shards beside what is there."""

    def change(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size=size)
        (folder / WEIGHTS).write_bytes(whole)

    return change


def only_shards(folder: Path) -> None:
    """Save in shards alone."""
    shard()(folder)
    (folder / WEIGHTS).unlink()


def repeat_a_tensor(change: float) -> Change:
    """Put a tensor of the first shard into the last one too, with all values changed by so much."""

    def rewrite(folder: Path) -> None:
        first, *_, last = sorted(folder.glob("model-*.safetensors"))
        name, value = next(iter(load_file(first).items()))
        save_file(load_file(last) | {name: value + change}, last, {"format": "pt"})

    return each(only_shards, rewrite)


def edit_index(**changes: object) -> Change:
    """Save in shards alone, and set keys of the index."""
    return each(only_shards, edit(INDEX, **changes))


def make_fp8(block: int | None = 32) -> Change:
    """Store each matrix of the blocks as FP8 codes with scales, as transformers does."""

    def rewrite(found: dict[str, Tensor]) -> dict[str, Tensor]:
        made = dict(found)
        for name, weight in found.items():
            if not name.endswith("_proj.weight"):
                continue
            rows, columns = weight.shape
            high, wide = (rows, columns) if block is None else (block, block)
            blocks = weight.reshape(rows // high, high, columns // wide, wide)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).reshape(rows, columns)
            made[name] = codes.to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = scale.reshape(()) if block is None else scale
        return made

    size = None if block is None else [block, block]
    described = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    return each(tensors(rewrite), edit(CONFIG, quantization_config=described))


def quantised(**described: object) -> Change:
    """Let config.json describe a quantisation."""
    return edit(CONFIG, quantization_config=described)


def change_tokenizer(change: Callable[[dict], None]) -> Change:
    """Change the content of tokenizer.json."""

    def rewrite(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        change(content)
        (folder / TOKENIZER).write_text(json.dumps(content))

    return rewrite


def add_token(content: str, number: int | None = None) -> Change:
    """Add a token, by default with the next id."""

    def change(tokenizer: dict) -> None:
        ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        chosen = max(ids) + 1 if number is None else number
        tokenizer["added_tokens"].append({"id": chosen, "content": content, **flags, "special": True})

    return change_tokenizer(change)


def resize(rows: int) -> Change:
    """What resize_token_embeddings and save_pretrained leave."""

    def change(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.save_pretrained(folder)

    return change


def in_words(tokenizer: dict) -> None:
    """Give the vocabulary another word, as a tokenizer of another model has."""
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["zebra"] = max(vocabulary.values()) + 1


BNB4 = {f"{PROJECTION}.weight.absmax": torch.ones(8), f"{PROJECTION}.weight.quant_map": torch.ones(16)}
BYTES = torch.zeros(64, 32, dtype=torch.uint8)
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "some/model"}


def with_tensors(**named: Tensor) -> Change:
    return put(**{name.replace(".", "__"): tensor for name, tensor in named.items()})


def misplace(folder: Path) -> None:
    """Let the index place the last norm in the first shard."""
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        file for file in files if file != index["weight_map"]["model.norm.weight"]
    )
    (folder / INDEX).write_text(json.dumps(index))


def take_place(tokenizer: dict) -> None:
    """Rename the word with the id 7 to the token that was added with it."""
    vocabulary = tokenizer["model"]["vocab"]
    word = next(word for word, number in vocabulary.items() if number == 7)
    del vocabulary[word]
    vocabulary["<tool>"] = 7


def rows_of(folder: Path) -> int:
    """Rows of the embedding."""
    return int(load_file(folder / WEIGHTS)["model.embed_tokens.weight"].shape[0])


#: Told from the files alone, before torch is loaded.
REFUSED = (
    # 0. What lies there in the place of a file (siblings of huggingface/datasets#8241).
    Row(
        "a configuration with a byte order mark",
        "none found",
        lambda folder: (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes()),
        "begins with a byte order mark, which transformers does not read; save it as UTF-8 without one",
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text("utf-8-sig")),
    ),
    Row(
        "a configuration in UTF-16",
        "none found",
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text(), "utf-16"),
        r"config\.json is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8",
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text("utf-16")),
    ),
    Row(
        "a web page for a tokenizer",
        "none found",
        write(TOKENIZER, b"<!DOCTYPE html>"),
        r"tokenizer\.json is a web page, not the file itself; download the file",
    ),
    Row(
        "git's pointer for a tokenizer",
        "none found",
        write(TOKENIZER, b"version https://git-lfs.github.com/spec/v1\n"),
        r"tokenizer\.json is what git keeps in the place of a large file, not the file; get it: git lfs pull",
    ),
    Row(
        "git's pointer for the weights",
        "none found",
        write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        r"model\.safetensors is what git keeps in the place of a large file, not the file; get it: git lfs pull",
    ),
    # 1. Quantised already.
    Row(
        "bitsandbytes 4-bit",
        "huggingface/optimum#1914",
        each(with_tensors(**BNB4), quantised(quant_method="bitsandbytes", load_in_4bit=True)),
        r"bitsandbytes 4-bit \(quantization_config.*float model it was made from.*model\.dequantize\(\)",
    ),
    Row(
        "bitsandbytes 4-bit whose quantization_config was removed",
        "huggingface/optimum-executorch#19",
        with_tensors(**BNB4),
        r"bitsandbytes 4-bit \(model\.layers\.0\.self_attn\.q_proj\.weight\.absmax\)",
        drop(r"absmax|quant_map"),
    ),
    Row(
        "bitsandbytes 8-bit",
        "huggingface/transformers-bloom-inference#85",
        with_tensors(**{f"{PROJECTION}.SCB": torch.ones(64)}),
        r"bitsandbytes 8-bit \(.*\.SCB\)",
        drop("SCB"),
    ),
    Row(
        "GPTQ",
        "wangzhaode/llm-export#72",
        quantised(quant_method="gptq", bits=4, group_size=128),
        r"in GPTQ \(quantization_config of config\.json\); export the float model it was made from$",
    ),
    Row(
        "GPTQ of the older layout",
        "intel/neural-speed#163",
        write("quantize_config.json", b"{}"),
        r"in GPTQ \(quantize_config\.json\)",
        remove("quantize_config.json"),
    ),
    Row(
        "AWQ, with the float model named in README.md",
        "huggingface/optimum#1953",
        each(
            quantised(quant_method="awq", bits=4),
            write("README.md", b"---\nbase_model: some/float-model\n---\n"),
        ),
        r"in AWQ .*; export the float model it was made from, some/float-model$",
    ),
    Row(
        "AWQ by its tensors alone",
        "casper-hansen/AutoAWQ#329",
        with_tensors(**{f"{PROJECTION}.qweight": torch.zeros(8, 8, dtype=torch.int32)}),
        r"in GPTQ or AWQ \(.*\.qweight\)",
        drop("qweight"),
    ),
    Row(
        "HQQ",
        "huggingface/transformers#33141",
        with_tensors(**{f"{PROJECTION}.W_q": BYTES}),
        r"in HQQ \(.*\.W_q\)",
        drop("W_q"),
    ),
    Row(
        "compressed-tensors with FP8",
        "huggingface/transformers#47145",
        each(make_fp8(), quantised(quant_method="compressed-tensors", format="float-quantized")),
        r"in compressed-tensors \(quantization_config",
    ),
    Row(
        "compressed-tensors by its tensors alone",
        "ml-explore/mlx-lm#989",
        with_tensors(**{f"{PROJECTION}.weight_packed": torch.zeros(64, 8, dtype=torch.int32)}),
        r"in compressed-tensors \(.*weight_packed\)",
        drop("weight_packed"),
    ),
    Row(
        "quanto",
        "huggingface/optimum-quanto#213",
        with_tensors(
            **{f"{PROJECTION}.weight._data": BYTES, f"{PROJECTION}.weight._scale": torch.ones(64, 1)}
        ),
        r"in quanto \(.*weight\._data\)",
        drop(r"\._(data|scale)$"),
    ),
    Row(
        "torchao",
        "huggingface/transformers#34355",
        quantised(quant_method="torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig"}}),
        r"in torchao \(quantization_config",
    ),
    Row(
        "MXFP4",
        "ml-explore/mlx-lm#570",
        with_tensors(**{"model.layers.0.mlp.experts.down_proj_blocks": BYTES}),
        r"in MXFP4 \(.*down_proj_blocks\)",
        drop("_blocks"),
    ),
    Row(
        "MLX 4-bit",
        "ml-explore/mlx-examples#367",
        each(
            with_tensors(
                **{f"{PROJECTION}.scales": torch.ones(64, 1), f"{PROJECTION}.biases": torch.ones(64, 1)}
            ),
            edit(CONFIG, quantization={"group_size": 64, "bits": 4}),
        ),
        r"in MLX \(quantization of config\.json\)",
    ),
    Row(
        "MLX by its tensors alone",
        "ml-explore/mlx-lm#1112",
        with_tensors(**{f"{PROJECTION}.scales": torch.ones(64, 1)}),
        r"in MLX \(.*\.scales\)",
        drop("scales"),
    ),
    Row(
        "torch's own int8",
        "huggingface/transformers#33358",
        with_tensors(**{f"{PROJECTION}._packed_params.dtype": torch.zeros(1)}),
        r"in torch int8 \(.*_packed_params",
        drop("_packed_params"),
    ),
    Row(
        "a method that nobody knows",
        "openai/gpt-oss-safeguard#1",
        quantised(quant_method="new-in-2030"),
        r"in quant_method 'new-in-2030'",
        edit(CONFIG, quantization_config=None),
    ),
    Row(
        "FP8 without quantization_config",
        "NVIDIA/TensorRT-Model-Connect#1115",
        each(make_fp8(), edit(CONFIG, quantization_config=None)),
        r"14 tensors in FP8.*config\.json does not say how.*restore its quantization_config",
        quantised(quant_method="fp8", weight_block_size=[32, 32]),
    ),
    Row(
        "FP8 whose scales have another name",
        "leejet/stable-diffusion.cpp#1898",
        each(make_fp8(), rename("weight_scale_inv", "scale_weight")),
        r"is in FP8, and model\.layers.*cannot be read: it has no scale beside it",
        rename("scale_weight", "weight_scale_inv"),
    ),
    Row(
        "FP8 that lost some scales",
        "unslothai/unsloth#6978",
        each(make_fp8(), drop("layers.0.mlp.gate_proj.weight_scale_inv")),
        r"is in FP8, and model\.layers\.0\.mlp\.gate_proj\.weight cannot be read: it has no scale",
    ),
    Row(
        "FP8 in blocks that transformers would cut otherwise",
        "none found",
        each(make_fp8(), quantised(quant_method="fp8", weight_block_size=[48, 48])),
        r"with scales \[2, 4\] in F32 is not whole blocks of \[48, 48\]",
        quantised(quant_method="fp8", weight_block_size=[32, 32]),
    ),
    Row(
        "whole numbers for weights",
        "BobJohnson24/ComfyUI-INT8-Fast#99",
        with_tensors(**{f"{PROJECTION}.weight": torch.zeros(64, 64, dtype=torch.int8)}),
        r"in whole numbers \(model\.layers\.0\.self_attn\.q_proj\.weight is I8\)",
    ),
    # 2. Weight files.
    Row(
        "a GGUF file alone in a folder",
        "Lightricks/ComfyUI-LTXVideo#163",
        each(remove(WEIGHTS, CONFIG), write("model-Q4_K_M.gguf")),
        r"as GGUF alone \(model-Q4_K_M\.gguf\), which is quantised; export the folder of the float model",
    ),
    Row(
        "only the publisher's consolidated weights",
        "meta-llama/llama-models#159",
        each(remove(WEIGHTS), write("consolidated.00.pth")),
        r"layout of their publisher alone \(consolidated\.00\.pth\)",
    ),
    Row(
        "only another framework's weights",
        "none found",
        each(remove(WEIGHTS), write("tf_model.h5")),
        r"another framework alone \(tf_model\.h5\)",
    ),
    Row(
        "a peft adapter instead of a model",
        "huggingface/transformers#25215",
        each(remove(WEIGHTS, CONFIG), edit("adapter_config.json", **ADAPTER)),
        r"is a peft adapter without its model; name the model's folder, and this one with --adapter",
    ),
    Row(
        "a peft adapter beside a model",
        "huggingface/transformers#43746",
        edit("adapter_config.json", **ADAPTER),
        r"holds a peft adapter beside the model \(adapter_config\.json\)",
        remove("adapter_config.json"),
    ),
    Row(
        "an index without shards",
        "ggml-org/llama.cpp#5559",
        each(remove(WEIGHTS), edit(INDEX, metadata={}, weight_map={"a": "model-00001-of-00001.safetensors"})),
        r"lacks 1 of the 1 weight files its index names, the first is model-00001-of-00001",
    ),
    Row(
        "an index that places a tensor where it is not",
        "huggingface/huggingface_hub#4725",
        each(only_shards, misplace),
        r"\.safetensors lacks model\.norm\.weight, which model\.safetensors\.index\.json places there",
    ),
    Row(
        "an index that names a shard outside the folder",
        "none found",
        edit_index(weight_map={"a": "../model.safetensors"}),
        r"has no weight_map from tensor names to file names in its folder",
    ),
    Row(
        "an index without metadata",
        "none found",
        edit_index(metadata=None),
        r'has no metadata, and transformers reads none without; add "metadata": \{\}',
        edit(INDEX, metadata={}),
    ),
    Row(
        "two shards with different values of one tensor",
        "JustVugg/colibri#1479",
        repeat_a_tensor(1.0),
        r"hold different values of .*; transformers would take the one of model-",
    ),
    Row(
        "config.json names a weight file that is not there",
        "none found",
        edit(CONFIG, transformers_weights="other.safetensors"),
        r"lacks other\.safetensors, which transformers_weights of its config\.json names",
        edit(CONFIG, transformers_weights=None),
    ),
    # 4. Tokenizer and model.
    Row(
        "vocab_size of another model than the embedding",
        "YangRui2015/RiC#19",
        edit(CONFIG, vocab_size=170),
        r"has vocab_size 170, and model\.embed_tokens\.weight has (\d+) rows; set vocab_size to \1",
        lambda folder: edit(CONFIG, vocab_size=rows_of(folder))(folder),
    ),
    Row(
        "a tokenizer of another model",
        "sillsdev/silnlp#1053",
        change_tokenizer(in_words),
        r"has 1 tokens that the embedding of \d+ rows has no row for, the first is zebra",
        lambda folder: resize(rows_of(folder) + 1)(folder),
    ),
    Row(
        "an end-of-text token without a row",
        "meta-llama/llama-cookbook#189",
        each(add_token("<end>"), edit(SETTINGS, eos_token="<end>")),
        r"eos_token <end> has the id (\d+), and the embedding has \1 rows; call model\.resize_token_embeddings",
        lambda folder: resize(rows_of(folder) + 1)(folder),
    ),
    Row(
        "an end-of-text token that tokenizer.json lacks",
        "deepseek-ai/DeepSeek-Coder-V2#25",
        edit(SETTINGS, eos_token="<|EOT|>"),
        r"eos_token is <\|EOT\|> in .*tokenizer_config\.json, and tokenizer\.json has no such token",
        edit(SETTINGS, eos_token=None),
    ),
    Row(
        "special_tokens_map.json against tokenizer_config.json",
        "huggingface/transformers#31099",
        each(edit(SETTINGS, sep_token="[SEP]"), edit("special_tokens_map.json", sep_token="[CLS]")),
        r"sep_token is \[SEP\] in .*tokenizer_config\.json and \[CLS\] in special_tokens_map\.json",
        edit("special_tokens_map.json", sep_token=None),
    ),
    Row(
        "an added token with the id of another",
        "openai/gpt-oss#286",
        add_token("<tool>", 7),
        r"adds <tool> with the id 7, which is .*'s in its vocabulary; rename",
        change_tokenizer(take_place),
    ),
    Row(
        "a token with two ids",
        "axolotl-ai-cloud/axolotl#1322",
        edit(SETTINGS, added_tokens_decoder={"9": {"content": "[CLS]"}}),
        r"\[CLS\] has the id \d+ in .*tokenizer\.json and 9 in tokenizer_config\.json \(added_tokens_decoder\)",
        edit(SETTINGS, added_tokens_decoder=None),
    ),
    Row(
        "pad_token_id of config.json beyond the embedding",
        "haotian-liu/LLaVA#94",
        edit(CONFIG, pad_token_id=5000),
        r"pad_token_id of .*config\.json is 5000, and the embedding has \d+ rows; set it to a token of the vocab",
        edit(CONFIG, pad_token_id=None),
    ),
    Row(
        "id2label and label2id that contradict each other",
        "huggingface/transformers#28589",
        edit(
            CONFIG,
            id2label={"0": "bad", "1": "good", "2": "mixed"},
            label2id={"good": 0, "bad": 1, "mixed": 2},
        ),
        r"contradicts itself: id2label gives class 0 the label .*, label2id says 1; correct one of the two, or remove",
        edit(CONFIG, label2id=None),
        "encoder",
    ),
    Row(
        "id2label that counts from 1",
        "none found",
        edit(CONFIG, id2label={"1": "bad", "2": "good", "3": "mixed"}),
        r"id2label of .* must be an object from the class indices 0, 1, … to labels",
        edit(CONFIG, id2label={"0": "bad", "1": "good", "2": "mixed"}),
        "encoder",
    ),
)


#: Told once the model is built from its configuration, before anything is computed.
REFUSED_ON_LOAD = (
    Row(
        "biases that config.json leaves out",
        "mlc-ai/mlc-llm#3494",
        with_tensors(**{f"{PROJECTION}.bias": torch.ones(64)}),
        r"holds model\.layers\.0\.self_attn\.q_proj\.bias, which its architecture does not have: .*attention_bias",
        each(
            tensors(
                lambda found: (
                    found
                    | {
                        f"model.layers.{block}.self_attn.{part}_proj.bias": torch.ones(
                            32 if part in "kv" else 64
                        )
                        for block in range(2)
                        for part in "qkvo"
                    }
                )
            ),
            edit(CONFIG, attention_bias=True),
        ),
    ),
    Row(
        "fewer blocks in config.json than in the weights",
        "none found",
        edit(CONFIG, num_hidden_layers=1),
        r"holds model\.layers\.1\..*: config\.json has num_hidden_layers 1; set it to the number of blocks",
        edit(CONFIG, num_hidden_layers=2),
    ),
    Row(
        "more blocks in config.json than in the weights",
        "vllm-project/vllm#11802",
        edit(CONFIG, num_hidden_layers=3),
        r"lacks 9 tensors .*, the first is model\.layers\.2.*num_hidden_layers 3 and the weights have 2",
        edit(CONFIG, num_hidden_layers=2),
    ),
    Row(
        "an adapter that was saved inside the model",
        "huggingface/peft#1932",
        with_tensors(**{f"{PROJECTION}.lora_A.default.weight": torch.ones(2, 64)}),
        r"holds an adapter that is not merged \(.*lora_A.*\); merge it with peft's merge_and_unload",
        drop("lora_A"),
    ),
    Row(
        "a compiled model, saved with its wrapper",
        "karpathy/nanoGPT#325",
        rename("^", "_orig_mod."),
        r"calls lm_head\.weight _orig_mod\.lm_head\.weight: it was saved from a wrapped model",
        rename("^_orig_mod.", ""),
    ),
    Row(
        "a model saved from data-parallel training",
        "FareedKhan-dev/train-llm-from-scratch#37",
        rename("^", "module."),
        r"calls lm_head\.weight module\.lm_head\.weight: it was saved from a wrapped model",
        rename("^module.", ""),
    ),
    Row(
        "no output layer, and none shared",
        "QwenLM/Qwen3-VL-Embedding#89",
        drop("lm_head"),
        r"lacks lm_head\.weight: it was saved without its output layer; set tie_word_embeddings to true",
        edit(CONFIG, tie_word_embeddings=True),
    ),
    Row(
        "an output layer of its own that config.json calls shared",
        "NVIDIA-NeMo/Automodel#2511",
        edit(CONFIG, tie_word_embeddings=True),
        r"different values for .*lm_head\.weight.*; set tie_word_embeddings to false there",
        edit(CONFIG, tie_word_embeddings=False),
    ),
    Row(
        "feed-forward layers of another size",
        "CASIA-LMC-Lab/FLAP#7",
        edit(CONFIG, intermediate_size=96),
        r"mlp\.down_proj\.weight as \[64, 128\], and config\.json makes it \[64, 96\]; correct intermediate_size",
        edit(CONFIG, intermediate_size=128),
    ),
    Row(
        "another number of key heads",
        "none found",
        edit(CONFIG, num_key_value_heads=4),
        r"k_proj\.weight as \[32, 64\], and config\.json makes it \[64, 64\]; correct num_key_value_heads",
        edit(CONFIG, num_key_value_heads=2),
    ),
    Row(
        "a whole training state as weights",
        "none found",
        lambda folder: (
            torch.save({"model": load_file(folder / WEIGHTS), "epoch": 3}, folder / "pytorch_model.bin"),
            (folder / WEIGHTS).unlink(),
        ),
        r"pytorch_model\.bin holds more than tensors; load the model with transformers",
    ),
)

#: Accepted, and named once.
NAMED = (
    Row(
        "saved twice, in shards and then whole",
        "Blaizzy/nativ#370",
        shard(),
        r"weight files not read \(model-0.* more\): the weights are those of model\.safetensors$",
    ),
    Row(
        "an old pytorch_model.bin beside safetensors",
        "Neph0s/CoSER#3",
        write("pytorch_model.bin"),
        r"1 weight file not read \(pytorch_model\.bin\)",
    ),
    Row(
        "a second model in a folder below",
        "Blaizzy/mlx-vlm#1464",
        write("original/consolidated.00.pth"),
        r"1 weight file not read \(original/consolidated\.00\.pth\)",
    ),
    Row(
        "an index with another total size",
        "axolotl-ai-cloud/axolotl#3758",
        edit_index(metadata={"total_size": 21}),
        r"model\.safetensors\.index\.json states 21 bytes of tensors, its files hold \d+",
    ),
    Row(
        "token ids of config.json that are not the tokenizer's",
        "huggingface/transformers#17431",
        each(edit(SETTINGS, bos_token="[CLS]"), edit(CONFIG, bos_token_id=0)),
        r"bos_token_id of config\.json is 0, the tokenizer's \[CLS\] is \d+: texts have the tokenizer's",
    ),
    Row(
        "an end of text in config.json that a small vocabulary does not have",
        "huggingface/transformers#15072",
        edit(CONFIG, eos_token_id=50256),
        r"eos_token_id of config\.json is 50256, and the embedding has \d+ rows: texts have the tokenizer's",
        edit(CONFIG, eos_token_id=None),
    ),
    Row(
        "an added token that the embedding has no row for",
        "MemPalace/mempalace#2114",
        add_token("<tool>"),
        r"Added tokens without a row in the embedding of (\d+): <tool> \(\1\)\. .*resize_token_embeddings",
        lambda folder: resize(rows_of(folder) + 1)(folder),
    ),
    Row(
        "a tokenizer that claims more positions than the model has",
        "huggingface/transformers#5444",
        edit(SETTINGS, model_max_length=4096),
        r"model_max_length of tokenizer_config\.json is 4096, the model has 64 positions",
    ),
)

#: Accepted with nothing to say.
SILENT = (
    Row("two shards with the same values of one tensor", "JustVugg/colibri#1480", repeat_a_tensor(0.0), ""),
    Row("what a training leaves", "none found", write("optimizer.pt"), ""),
    Row("FP8 in blocks", "unslothai/unsloth#6200", make_fp8(), ""),
    Row("FP8 with one scale for each matrix", "vllm-project/vllm#4118", make_fp8(None), ""),
    Row(
        "a rotary buffer of an older release",
        "none found",
        with_tensors(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        "",
    ),
    Row(
        "a tied copy that is the same",
        "vllm-project/vllm#6758",
        each(
            tensors(lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()}),
            edit(CONFIG, tie_word_embeddings=True),
        ),
        "",
    ),
)


@pytest.fixture(scope="module")
def models() -> dict[str, Path]:
    """The good folders: a decoder with its output layer, and an encoder."""

    def make(folder: Path) -> None:
        tiny.write_model(folder / "decoder", "llama", "causal_lm")

    return {
        "decoder": shared_folder("field-decoder", (), make) / "decoder",
        "encoder": tiny.shared_model(),
    }


def situation(models: dict[str, Path], row: Row, folder: Path) -> Path:
    """A copy of the row's good folder, damaged."""
    shutil.copytree(models[row.model], folder)
    row.damage(folder)
    return folder


def check(folder: Path, row: Row) -> tuple[str, ...]:
    """What is told from the files alone."""
    return check_model_folder(folder, tiny.LABELS if row.model == "encoder" else ())


def load(folder: Path, row: Row) -> LoadedModel:
    """The folder's model, once it is accounted for."""
    task: TaskKind = "classification" if row.model == "encoder" else "causal_lm"
    return load_model(
        folder, 3, SliceOptions(targets=("query" if task == "classification" else "q_proj",), rank=2), task
    )


def ids(rows: tuple[Row, ...]) -> list[str]:
    return [row.name for row in rows]


@pytest.mark.parametrize("row", REFUSED, ids=ids(REFUSED))
def test_what_files_tell_is_refused_and_the_way_out_works(models, tmp_path: Path, row: Row) -> None:
    """The message is one line that names the situation; after what it says to do, the folder is accepted."""
    folder = situation(models, row, tmp_path / "model")
    with pytest.raises(EdgeError) as caught:
        check(folder, row)
    message = str(caught.value)
    assert re.search(row.says, message), message
    assert "\n" not in message
    if row.mend is not None:
        row.mend(folder)
        check(folder, row)


@pytest.mark.parametrize("row", REFUSED_ON_LOAD, ids=ids(REFUSED_ON_LOAD))
def test_tensors_of_another_model_are_refused_and_the_way_out_works(models, tmp_path: Path, row: Row) -> None:
    """Names, shapes and types are compared with config.json before anything is computed."""
    folder = situation(models, row, tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        load(folder, row)
    message = str(caught.value)
    assert re.search(row.says, message), message
    assert "\n" not in message
    if row.mend is not None:
        row.mend(folder)
        check(folder, row)
        load(folder, row)


@pytest.mark.parametrize("row", NAMED, ids=ids(NAMED))
def test_what_is_not_used_is_named_once(models, tmp_path: Path, row: Row) -> None:
    """A folder that works although something in it is not used is accepted, with one sentence about it."""
    folder = situation(models, row, tmp_path / "model")
    found = [note for note in (*check(folder, row), *load(folder, row).notes) if re.search(row.says, note)]
    assert len(found) == 1
    if row.mend is not None:
        row.mend(folder)
        assert check(folder, row) == ()


@pytest.mark.parametrize("row", SILENT, ids=ids(SILENT))
def test_what_does_not_matter_is_not_mentioned(models, tmp_path: Path, row: Row) -> None:
    """Known buffers, equal copies and dequantised FP8 give no sentence."""
    folder = situation(models, row, tmp_path / "model")
    assert check(folder, row) == ()
    assert load(folder, row).notes == ()


def test_every_refusal_comes_before_torch_is_loaded(models, tmp_path: Path) -> None:
    """The command refuses each folder with its exit code while neither torch nor transformers has been imported."""
    for number, row in enumerate(REFUSED):
        situation(models, row, tmp_path / f"model-{number}")
    (tmp_path / "labels.json").write_text(json.dumps(tiny.LABELS))
    (tmp_path / "rows.jsonl").write_text('{"text": "a dull plot", "label": "bad"}\n')
    generate_key().save(tmp_path / "key")
    (tmp_path / "exists").mkdir()
    common = ["--check-data", "rows.jsonl", "--key", "key"]
    decoder, encoder = ["--task", "causal_lm"], ["--labels", "labels.json"]
    calls = [
        [
            "package",
            f"model-{number}",
            "--output",
            "out",
            *common,
            *(encoder if row.model == "encoder" else decoder),
        ]
        for number, row in enumerate(REFUSED)
    ]
    good = str(models["decoder"])
    calls += [
        ["package", good, "--output", "exists", *common, *decoder],
        ["package", good, "--output", "out", *common, *decoder, "--engine", "tensorflow"],
        ["package", good, "--output", "out", *common, *decoder, "--rank", "0"],
        ["package", good, "--output", "out", "--check-data", "rows.jsonl", "--key", "labels.json", *decoder],
        ["package", good, "--output", "out", *common, "--labels", "rows.jsonl"],
        ["package", "nowhere", "--output", "out", *common, *decoder],
    ]
    program = (
        "import json, sys\n"
        "from export.cli import main\n"
        f"codes = [main(call) for call in json.loads({json.dumps(calls)!r})]\n"
        "print(json.dumps([codes, sorted({'torch', 'transformers'} & set(sys.modules))]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    codes, loaded = json.loads(done.stdout)
    assert loaded == []
    assert all(code in (11, 31) for code in codes), codes
    assert len(done.stderr.splitlines()) == len(calls), done.stderr


@pytest.mark.parametrize("block", [32, None])
def test_fp8_is_read_as_transformers_dequantises_it(models, tmp_path: Path, block: int | None) -> None:
    """Each FP8 matrix is its codes times its scales, bit for bit what transformers loads, and near its float twin."""
    row = Row("fp8", "unslothai/unsloth#6200", make_fp8(block), "")
    folder = situation(models, row, tmp_path / "model")
    model = load(folder, row)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    twin = load_file(models["decoder"] / WEIGHTS)
    for name, expected in theirs.named_parameters():
        ours = f"encoder.{name}"
        if name.startswith(PROJECTION):
            ours = ours.replace("q_proj.", "q_proj.linear.")
        if ours not in dict(model.module.named_parameters()):
            continue
        found = model.tensor(ours)
        assert torch.equal(found, expected), name
        assert (found - twin[name]).abs().max() <= twin[name].abs().max() / 16


def test_the_whole_file_is_read_where_an_older_index_is_left(models, tmp_path: Path) -> None:
    """Of a whole file and shards, the values are those of the whole file, as transformers loads them."""
    row = Row("twice", "Blaizzy/nativ#370", shard(), "")
    folder = situation(models, row, tmp_path / "model")
    tensors(lambda found: found | {"model.norm.weight": torch.full((64,), 3.0)})(folder)
    assert load(folder, row).tensor("encoder.model.norm.weight").eq(3.0).all()
    assert AutoModelForCausalLM.from_pretrained(folder).model.norm.weight.eq(3.0).all()


def test_a_folder_that_is_captured_leaves_no_tensor_unread(models, tmp_path: Path) -> None:
    """Every tensor of a good folder is one that the captured model computes with."""
    row = Row("good", "none found", lambda folder: None, "")
    model = load(situation(models, row, tmp_path / "model"), row)
    captured = capture(model)
    used = {source for segment in captured.segments for source in segment.weights.values()}
    stored = {
        f"encoder.{name}".replace("_proj.weight", "_proj") for name in load_file(models["decoder"] / WEIGHTS)
    }
    assert stored == {
        source.replace(".linear", "").replace("_proj.weight", "_proj")
        for source in used
        if source.startswith("encoder.") and not source.endswith((".up", ".down", ".scale", "inv_freq"))
    }
