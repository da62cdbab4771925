"""Read a checkpoint of llama2.c and write it as a Hugging Face folder.

llama2.c (A. Karpathy, MIT licence) stores a Llama in one file, "version 0": seven int32 (dim, hidden_dim, n_layers,
n_heads, n_kv_heads, vocab_size, max_seq_len), then float32 tensors one after another, as its ``run.c`` maps them. A
negative vocab_size says that the classifier is not the embedding and follows at the end.

Its rotary embedding turns neighbouring pairs (2i, 2i+1) of a head; Hugging Face's turns (i, i + size/2). Rows of the
query and key matrices are reordered so that both give the same scores. The model itself is that of Touvron et al.
2023, arXiv 2307.09288, with RMS norms of epsilon 1e-5.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.errors import ModelError
from export.llama2c.tokenizer import BEGIN, SPECIAL, UNKNOWN, read_vocabulary, tokenizer_json

FloatArray = NDArray[np.float32]
HEADER = struct.Struct("<7i")
#: First int32 of the later forms, which this reader does not know: "ak42".
VERSIONED_MAGIC = 0x616B3432
#: Larger than any model in this form: a file whose header says more is no checkpoint.
LIMITS = {
    "dim": 1 << 16,
    "hidden_dim": 1 << 20,
    "n_layers": 1024,
    "n_heads": 1024,
    "n_kv_heads": 1024,
    "vocab_size": 1 << 20,
    "max_seq_len": 1 << 20,
}
NORM_EPSILON, ROTARY_BASE = 1e-5, 10000.0


@dataclass(frozen=True)
class Llama2cShape:
    """Sizes of a model, from the header of its checkpoint.

    Attributes:
        dim: values of a hidden state.
        hidden_dim: values within the feed-forward part.
        n_layers: number of blocks.
        n_heads: query heads of a block.
        n_kv_heads: key and value heads of a block.
        vocab_size: number of tokens in the vocabulary.
        max_seq_len: longest text, in tokens.
        shared_classifier: whether the output matrix is the embedding.
    """

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int
    shared_classifier: bool

    @property
    def head_size(self) -> int:
        """Numbers in a head."""
        return self.dim // self.n_heads

    @property
    def stored(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, in the order of the file; the two rotary tables stand in it and are not needed."""
        layers, dim, hidden = self.n_layers, self.dim, self.hidden_dim
        keys = self.n_kv_heads * self.head_size
        tables = (self.max_seq_len, self.head_size // 2)
        shapes: dict[str, tuple[int, ...]] = {
            "embedding": (self.vocab_size, dim),
            "attention_norm": (layers, dim),
            "query": (layers, dim, dim),
            "key": (layers, keys, dim),
            "value": (layers, keys, dim),
            "output": (layers, dim, dim),
            "mlp_norm": (layers, dim),
            "gate": (layers, hidden, dim),
            "down": (layers, dim, hidden),
            "up": (layers, hidden, dim),
            "final_norm": (dim,),
            "rotary_cosine": tables,
            "rotary_sine": tables,
        }
        if not self.shared_classifier:
            shapes["classifier"] = (self.vocab_size, dim)
        return shapes


#: Hugging Face's names within a layer, by the names in :attr:`Llama2cShape.stored`.
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def convert(checkpoint: Path, tokenizer: Path, output: Path) -> Llama2cShape:
    """Write ``config.json``, ``model.safetensors``, ``tokenizer.json`` and ``tokenizer_config.json``, or nothing.

    The model is held in memory twice: models in this form are small.

    Args:
        checkpoint: llama2.c checkpoint, version 0.
        tokenizer: llama2.c's ``.bin`` for the same vocabulary.
        output: folder to create.

    Raises:
        ModelError: a file cannot be read, is truncated or is not of its form, the two do not belong together, or
            ``output`` exists; says which, and what to do.
    """
    if output.exists():
        raise ModelError(f"{output} exists already; choose another --output or remove it")
    shape, stored = read_checkpoint(checkpoint)
    vocabulary = read_vocabulary(tokenizer, shape.vocab_size)
    files = {
        "config.json": json.dumps(_config(shape), indent=2).encode(),
        "tokenizer.json": tokenizer_json(vocabulary).encode(),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": shape.max_seq_len,
                "pad_token": SPECIAL[UNKNOWN],
            },
            indent=2,
        ).encode(),
        "model.safetensors": bytes(save(huggingface_tensors(shape, stored), metadata={"format": "pt"})),
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".llama2c-") as temporary:
            folder = Path(temporary) / "model"
            folder.mkdir()
            for name, data in files.items():
                write_durably(folder / name, data)
            rename_durably(folder, output)
    except OSError as error:
        raise ModelError(
            f"cannot write {output}: {error.strerror or error}; choose another --output"
        ) from error
    return shape


def read_checkpoint(path: Path) -> tuple[Llama2cShape, dict[str, FloatArray]]:
    """The header, and the stored tensors by their name in :attr:`Llama2cShape.stored`, mapped from the file.

    Raises:
        ModelError: the file cannot be read, is truncated or is no checkpoint of version 0.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise ModelError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    shape = _parse_header(path, header)
    counts = {name: int(np.prod(sides, dtype=np.int64)) for name, sides in shape.stored.items()}
    wanted = HEADER.size + 4 * sum(counts.values())
    if size != wanted:
        raise ModelError(
            f"{path} has {size} bytes, its header asks for {wanted}; it is truncated or no llama2.c checkpoint "
            "of version 0: fetch it again"
        )
    values: FloatArray = np.memmap(path, dtype="<f4", mode="r", offset=HEADER.size)
    tensors, start = {}, 0
    for name, sides in shape.stored.items():
        tensors[name] = values[start : start + counts[name]].reshape(sides)
        start += counts[name]
    return shape, tensors


def huggingface_tensors(shape: Llama2cShape, stored: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The tensors under the names and in the order of rows that ``LlamaForCausalLM`` has."""
    tensors = {"model.embed_tokens.weight": stored["embedding"], "model.norm.weight": stored["final_norm"]}
    if not shape.shared_classifier:
        tensors["lm_head.weight"] = stored["classifier"]
    for name, target in LAYER_NAMES.items():
        for layer in range(shape.n_layers):
            tensor = stored[name][layer]
            if name in ("query", "key"):
                tensor = _halves(tensor, shape.head_size)
            tensors[f"model.layers.{layer}.{target}.weight"] = tensor
    return {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}


def _halves(matrix: FloatArray, head_size: int) -> FloatArray:
    """Rows of each head, first those at even places, then those at odd ones."""
    heads = matrix.reshape(-1, head_size // 2, 2, matrix.shape[1])
    return heads.transpose(0, 2, 1, 3).reshape(matrix.shape)


def _parse_header(path: Path, header: bytes) -> Llama2cShape:
    if len(header) < HEADER.size:
        raise ModelError(f"{path} ends within its header of {HEADER.size} bytes; fetch it again")
    numbers = dict(zip(LIMITS, HEADER.unpack(header), strict=True))
    if numbers["dim"] == VERSIONED_MAGIC:
        raise ModelError(
            f"{path} is of version {numbers['hidden_dim']}, this reads version 0; "
            "write it with llama2.c's export.py --version 0"
        )
    shared = numbers["vocab_size"] > 0
    numbers["vocab_size"] = abs(numbers["vocab_size"])
    for name, limit in LIMITS.items():
        if not 1 <= numbers[name] <= limit:
            raise ModelError(
                f"{path} is no llama2.c checkpoint of version 0: its header says {name} = {numbers[name]}, "
                f"which may be 1 to {limit}"
            )
    shape = Llama2cShape(**numbers, shared_classifier=shared)
    if shape.dim % shape.n_heads or shape.n_heads % shape.n_kv_heads or shape.head_size % 2:
        raise ModelError(
            f"{path} is no llama2.c checkpoint of version 0: dim {shape.dim}, {shape.n_heads} heads and "
            f"{shape.n_kv_heads} key heads do not divide into heads of an even size"
        )
    return shape


def _config(shape: Llama2cShape) -> dict[str, object]:
    """``config.json``. llama2.c ends a text with the token that begins one."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_seq_len,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROTARY_BASE,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.shared_classifier,
        "bos_token_id": BEGIN,
        "eos_token_id": BEGIN,
        "dtype": "float32",
    }
