"""Load a classifier that stands in this folder, with torch and transformers (and peft, if it is an adapter).

    from load_classifier import load

    classify, labels = load("FOLDER")               # a merged model
    classify, labels = load("FOLDER", "BASE MODEL")  # an adapter, for the model that it was trained on
    logits = classify(**tokenizer(texts, padding=True, return_tensors="pt"))  # (texts, labels)
    print([labels[index] for index in logits.argmax(1)])

The class that transformers has for this model makes its features otherwise, so it cannot load this head: features
are the hidden states of the last layer, pooled as head.json says and divided by their root mean square.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModel


class Classifier(torch.nn.Module):
    """A model, the pooling of its last hidden states, and a linear layer on top."""

    def __init__(self, model: Any, head: dict[str, torch.Tensor], pooling: str) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        self.weight, self.bias = torch.nn.Parameter(head["weight"]), torch.nn.Parameter(head["bias"])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **given: Any) -> torch.Tensor:
        """Logits (texts, labels); texts are padded on either side."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **given).last_hidden_state
        mask = attention_mask.to(hidden.dtype)
        if self.pooling == "mean":
            weights = mask / mask.sum(1, keepdim=True)
        else:  # the first or the last real token
            place = mask.argmax(1) if self.pooling == "first" else (mask.cumsum(1) * mask).argmax(1)
            weights = torch.nn.functional.one_hot(place, mask.shape[1]).to(hidden.dtype)
        pooled = (hidden * weights[..., None]).sum(1)
        features = pooled * pooled.square().mean(-1, keepdim=True).rsqrt()
        return torch.nn.functional.linear(features, self.weight, self.bias)


def load(folder: str, base_model: str | None = None) -> tuple[Classifier, list[str]]:
    """The classifier in evaluation mode, and its labels in the order of its logits."""
    described = json.loads((Path(folder) / "head.json").read_text("utf-8"))
    model = AutoModel.from_pretrained(base_model or folder, dtype=torch.float32)
    if base_model is not None:
        from peft import PeftModel  # noqa: PLC0415 - a merged model needs no peft

        model = PeftModel.from_pretrained(model, folder)
    head = load_file(Path(folder) / "head.safetensors")
    return Classifier(model, head, described["pooling"]).eval(), described["labels"]
