"""Random-weight model folders of given shapes, for figures that depend on shapes and not on what was learnt."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

#: What ``transformers`` reads of a tokenizer; the vocabulary is BERT's uncased one, the same for all shapes.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder: ``hidden`` values a token, ``inner`` of the feed-forward part."""

    name: str
    hidden: int
    blocks: int
    heads: int
    inner: int


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama decoder; ``groups`` are its key and value heads."""

    name: str
    hidden: int
    blocks: int
    heads: int
    groups: int
    inner: int
    vocabulary: int


#: TinyLlama's (Zhang et al. 2024, arXiv 2401.02385, table 1).
LLAMA_1B = DecoderShape(
    "Llama 1.1B", hidden=2048, blocks=22, heads=32, groups=4, inner=5632, vocabulary=32_000
)
BERT_BASE = Shape("BERT-base", hidden=768, blocks=12, heads=12, inner=3072)
BERT_LARGE = Shape("BERT-large", hidden=1024, blocks=24, heads=16, inner=4096)


def write_shape(folder: Path, shape: Shape, tokenizer_folder: Path, seed: int = 0) -> Path:
    """Write a model folder of that shape with random weights, or leave it if it is there.

    Args:
        folder: to create. shape: which sizes.
        tokenizer_folder: a model folder with BERT's uncased tokenizer.
        seed: of the weights.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
    )
    _copy_tokenizer(tokenizer_folder, folder)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_decoder(folder: Path, shape: DecoderShape, tokenizer_folder: Path, seed: int = 0) -> Path:
    """The same for a decoder, its weights in bfloat16; the tokenizer's vocabulary must fit the shape's."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        dtype=torch.bfloat16,
    )
    _copy_tokenizer(tokenizer_folder, folder)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def _copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
