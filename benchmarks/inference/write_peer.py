"""Write the peer of ``make bench-predict``: exported by ``torch.onnx``, quantised by ONNX Runtime's own tool."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from transformers import AutoModel

from benchmarks.harness.long_rows import LABELS


class MeanClassifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head of zeros, as a fresh package has it."""

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            folder, local_files_only=True, add_pooling_layer=False
        ).eval()
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, C) of ids and mask (B, T)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.head(pooled * torch.rsqrt((pooled * pooled).mean(-1, keepdim=True)))
        return logits


def main() -> int:
    """``write_peer MODEL OUTPUT``."""
    model, output = map(Path, sys.argv[1:])
    module = MeanClassifier(model, len(json.loads(LABELS.read_text()))).eval()
    ids = torch.ones(2, 7, dtype=torch.long)
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=512)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        torch.onnx.export(
            module,
            (ids, ids),
            plain,
            dynamo=True,
            input_names=["input_ids", "attention_mask"],
            dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}),
            external_data=False,
        )
        model_file = onnx.load(plain)
        del model_file.graph.value_info[
            :
        ]  # the quantising tool infers shapes anew, and trips over given ones
        onnx.save(model_file, plain)
        quantize_dynamic(plain, output, per_channel=True, weight_type=QuantType.QInt8)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
