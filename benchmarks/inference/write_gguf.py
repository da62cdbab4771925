"""Write a Llama's folder as GGUF, for the peer of ``make bench-generation``: float32, or matrices in ``Q4_0``.

``Q4_0`` has four bits and a scale of 16 bits for every 32 inputs; a matrix whose inputs are no multiple of 32 stays
float32. Rows of queries and keys are put in the order that llama.cpp rotates, in which the two numbers of a pair lie
beside each other. Pieces of the vocabulary are placeholders, since the bench speaks in token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors import safe_open

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCK = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
BLOCK, FIRST_BYTE = 32, 3


def main() -> int:
    """``write_gguf MODEL OUTPUT float32|q4_0``."""
    model, output, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(output, "llama")
    _add_shape(writer, config)
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                matrix = opened.get_tensor(name).float().numpy()
                if ".q_proj." in name:
                    matrix = _pairs_together(matrix, config["num_attention_heads"])
                elif ".k_proj." in name:
                    matrix = _pairs_together(matrix, config["num_key_value_heads"])
                if kind == "q4_0" and matrix.ndim == 2 and matrix.shape[1] % BLOCK == 0:
                    packed = gguf.GGMLQuantizationType.Q4_0
                    writer.add_tensor(_name(name), quantize(matrix, packed), raw_dtype=packed)
                else:
                    writer.add_tensor(_name(name), matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


def _name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{IN_BLOCK[rest]}"


def _pairs_together(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from "first halves, then second halves" to "pair by pair"."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_shape(writer: gguf.GGUFWriter, config: dict) -> None:
    size = config["vocab_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    pieces, types = [f"<{number}>" for number in range(size)], [int(gguf.TokenType.NORMAL)] * size
    for byte in range(
        256
    ):  # llama.cpp looks for the pieces of single bytes, where Llama's vocabulary has them
        pieces[FIRST_BYTE + byte], types[FIRST_BYTE + byte] = f"<0x{byte:02X}>", int(gguf.TokenType.BYTE)
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(types)


if __name__ == "__main__":
    raise SystemExit(main())
