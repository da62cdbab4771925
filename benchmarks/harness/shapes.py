"""Random-weight model folders of given shapes, for figures that depend on shapes and not on what was learnt.

Decoders are written shard by shard, a shard a block, so that a model larger than memory can be made.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

#: Files that ``transformers`` reads a tokenizer from; the vocabulary is BERT's uncased one for all shapes.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of a BERT encoder.

    Attributes:
        name: what tables call it.
        hidden: values of a hidden state.
        blocks: number of blocks.
        heads: attention heads of a block.
        inner: values within the feed-forward part.
    """

    name: str
    hidden: int
    blocks: int
    heads: int
    inner: int


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama decoder.

    Attributes:
        name: what tables call it.
        hidden: values of a hidden state.
        blocks: number of blocks.
        heads: query heads of a block.
        groups: key and value heads of a block.
        inner: values within the feed-forward part.
        vocabulary: number of tokens in the vocabulary.
    """

    name: str
    hidden: int
    blocks: int
    heads: int
    groups: int
    inner: int
    vocabulary: int


#: Sizes of Llama 2 7B (Touvron et al. 2023, arXiv 2307.09288, and its published configuration).
LLAMA_7B = DecoderShape(
    "Llama 7B", hidden=4096, blocks=32, heads=32, groups=32, inner=11_008, vocabulary=32_000
)
#: Sizes of TinyLlama (Zhang et al. 2024, arXiv 2401.02385, table 1).
LLAMA_1B = DecoderShape(
    "Llama 1.1B", hidden=2048, blocks=22, heads=32, groups=4, inner=5632, vocabulary=32_000
)
#: Sizes of the two smaller SmolLM, from their published configurations.
LLAMA_360M = DecoderShape(
    "Llama 360M", hidden=960, blocks=32, heads=15, groups=5, inner=2560, vocabulary=49_152
)
LLAMA_135M = DecoderShape(
    "Llama 135M", hidden=576, blocks=30, heads=9, groups=3, inner=1536, vocabulary=49_152
)
BERT_BASE = EncoderShape("BERT-base", hidden=768, blocks=12, heads=12, inner=3072)
BERT_LARGE = EncoderShape("BERT-large", hidden=1024, blocks=24, heads=16, inner=4096)


def write_shape(folder: Path, shape: EncoderShape, tokenizer_folder: Path, seed: int = 0) -> Path:
    """Write an encoder of a shape with random weights; a folder that is there already is left as it is.

    Args:
        folder: model folder to create.
        shape: sizes of the model.
        tokenizer_folder: model folder with BERT's uncased tokenizer.
        seed: seed of the weights.
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
    """Write a decoder of a shape with random weights in bfloat16, holding one shard in memory at a time.

    Args:
        folder: model folder to create; one that is there already is left as it is.
        shape: sizes of the model; its vocabulary is at least the tokenizer's.
        tokenizer_folder: model folder with BERT's uncased tokenizer.
        seed: seed of the weights.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, sides in shapes.items():
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = sides
    _copy_tokenizer(tokenizer_folder, folder)
    places = {}
    for file, names in shards.items():
        tensors = {}
        for name, sides in names.items():
            # Norm weights are ones; matrices as Llama starts them.
            drawn = torch.ones(sides) if len(sides) == 1 else torch.randn(sides, generator=generator) * 0.02
            tensors[name] = drawn.to(torch.bfloat16)
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(2 * s.numel() for s in shapes.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return folder


def _copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
