"""Load a classifier that stands in this folder, with torch and transformers (and peft, if it is an adapter).

    from load_classifier import load

    classify, labels = load("FOLDER")               # a merged model
    classify, labels = load("FOLDER", "BASE MODEL")  # an adapter, for the model that it was trained on
    logits = classify(**tokenizer(texts, padding=True, return_tensors="pt"))  # (texts, labels)
    print([labels[index] for index in logits.argmax(1)])

The class that transformers has for this model makes its features otherwise, so it cannot load this head: features
are the hidden states of the last layer, or those behind each of the blocks that head.json names (0: the input of the
first), pooled as it says and divided by their root mean square.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModel


class Classifier(torch.nn.Module):
    """A model, the pooling of its hidden states, and a linear layer on top."""

    def __init__(self, model: Any, head: dict[str, torch.Tensor], described: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.pooling = model, described["pooling"]
        self.blocks, self.layers = described.get("blocks", []), described.get("layers", 0)
        self.weight, self.bias = torch.nn.Parameter(head["weight"]), torch.nn.Parameter(head["bias"])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **given: Any) -> torch.Tensor:
        """Logits (texts, labels); texts are padded on either side."""
        last, behind = self.hidden_states({"input_ids": input_ids, "attention_mask": attention_mask, **given})
        states = [behind[block] for block in self.blocks] or [last]
        features = torch.cat([self.features(hidden, attention_mask) for hidden in states], dim=1)
        return torch.nn.functional.linear(features, self.weight, self.bias)

    def hidden_states(self, given: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last hidden state, and those before and behind each block: of the list that is called once a layer."""
        calls: dict[int, list[torch.Tensor]] = {}

        def note(number: int, args: Any, named: Any, output: Any) -> None:
            before = args[0] if args else named["hidden_states"]
            calls.setdefault(number, [before]).append(output[0] if isinstance(output, tuple) else output)

        lists = [m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList)] if self.blocks else []
        hooks = [
            block.register_forward_hook(
                lambda _, a, n, o, number=number: note(number, a, n, o), with_kwargs=True
            )
            for number, blocks in enumerate(lists)
            for block in blocks
        ]
        try:
            last = self.model(**given).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return last, next((found for found in calls.values() if len(found) == self.layers + 1), [])

    def features(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Pooled hidden states of root mean square 1."""
        mask = attention_mask.to(hidden.dtype)
        if self.pooling == "max":
            pooled = hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
        else:
            weights = mask / mask.sum(1, keepdim=True)
            if self.pooling != "mean":  # the first or the last real token
                place = mask.argmax(1) if self.pooling == "first" else (mask.cumsum(1) * mask).argmax(1)
                tokens = torch.arange(mask.shape[1], device=mask.device)
                weights = (tokens == place[:, None]).to(hidden.dtype)
            pooled = (hidden * weights[..., None]).sum(1)
        return pooled * pooled.square().mean(-1, keepdim=True).rsqrt()


def load(folder: str, base_model: str | None = None) -> tuple[Classifier, list[str]]:
    """The classifier in evaluation mode, and its labels in the order of its logits."""
    described = json.loads((Path(folder) / "head.json").read_text("utf-8"))
    model = AutoModel.from_pretrained(base_model or folder, dtype=torch.float32)
    if base_model is not None:
        from peft import PeftModel  # noqa: PLC0415 - a merged model needs no peft

        model = PeftModel.from_pretrained(model, folder)
    head = load_file(Path(folder) / "head.safetensors")
    return Classifier(model, head, described).eval(), described["labels"]
