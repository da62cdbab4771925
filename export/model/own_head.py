"""The classifier that a model folder was saved with, cut where training goes on: its last linear layer.

Everything between the base model's outputs and that layer is frozen: pooling, and layers such as BERT's pooler or
RoBERTa's ``classifier.dense``. It is computed by the class's own code, which is run on the base model's outputs with
the last layer taken out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from export.model.heads import pool


class UnusableHead(Exception):  # noqa: N818 - no error: the export goes on with a fresh head
    """Why a folder's own classifier cannot be trained further; the reason completes "is not used: …"."""


class _Given(nn.Module):
    """Stands in the place of the base model, and gives the outputs it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Any] = []

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.held[0]


class OwnHead(nn.Module):
    """The frozen part of a folder's classifier: from the base model's outputs to the input of its last linear layer.

    Args:
        model: the folder's class with a classifier, without values; it is taken apart.
        causal: whether attention looks back only. Such classes compute logits for every token and take those of the
            last real one; here its hidden state is taken, and the logits follow.

    Attributes:
        classifier: dotted path of the last linear layer in the class.
        linear: that layer, without values.
        pools: whether the base model's own pooler is part of it.
        tensors: names of all parameters that the class has beside the base model's.

    Raises:
        UnusableHead: the class has no linear layer of that many outputs outside the base model, or its last one is not
            the last.
    """

    def __init__(self, model: PreTrainedModel, *, causal: bool) -> None:
        super().__init__()
        base = model.base_model_prefix
        if getattr(model, base, None) is None:
            raise UnusableHead(f"{type(model).__name__} keeps its model under no name of its own")
        self.pools = getattr(getattr(model, base), "pooler", None) is not None
        setattr(model, base, _Given())
        self.tensors = tuple(name for name, _ in model.named_parameters())
        linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
        ]
        if not linears:
            raise UnusableHead(f"{type(model).__name__} has no linear layer with one output a class")
        self.classifier = linears[-1]
        self.linear = [model.get_submodule(self.classifier)]  # in a list: the trained one takes its place
        parent, _, child = self.classifier.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
        self.model = None if causal else model
        self._base = base

    def forward(self, outputs: Any, attention_mask: Tensor) -> Tensor:
        """Features (B, H) of the base model's outputs, for a mask (B, T)."""
        if self.model is None:
            return pool(outputs.last_hidden_state, attention_mask, "last")
        given = getattr(self.model, self._base)
        given.held[:] = [outputs]
        ids = torch.zeros_like(attention_mask)
        features: Tensor = self.model(input_ids=ids, attention_mask=attention_mask).logits
        given.held.clear()
        return features


def classifier_of(config: Any) -> type[PreTrainedModel]:
    """The class with a classifier that transformers has for a configuration, if it is the one that it names.

    Raises:
        UnusableHead: it is another one, or there is none.
    """
    named = str((config.architectures or [None])[0])
    known: type[PreTrainedModel] | None = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if known is None or known.__name__ != named:
        raise UnusableHead(f"transformers has no class {named} for {config.model_type}")
    return known
