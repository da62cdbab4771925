"""What a model is trained for, as modules to capture: classification with an exact head gradient, or the next token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.data.batches import NOT_PREDICTED
from edge_runtime.package.manifest import Features, TaskKind

HEAD = "head"
#: Outputs of the last segment, by task.
OUTPUTS: dict[TaskKind, tuple[str, ...]] = {
    "classification": ("loss", "logits", "residual", "features"),
    "causal_lm": ("loss", "correct"),
}


class Head(nn.Module):
    """Linear classifier over features: pooled hidden states, or what the folder's own classifier makes of them.

    Pooling averages the last hidden states of real tokens, or takes the first token's or the last real token's. Where
    attention is causal only the last one has seen the whole text. A fresh head's feature is scaled to length
    sqrt(hidden size), so that one learning rate suits every model; a folder's own is as its class makes it. Padding is
    on the right.
    """

    def __init__(self, hidden_size: int, classes: int, features: Features, *, has_bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, hidden_size))
        self.bias = nn.Parameter(torch.zeros(classes)) if has_bias else None
        self.features = features

    def forward(self, hidden: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Loss and what the exact head gradient needs.

        Args:
            hidden: last hidden states, (B, T, H); for the folder's own classifier its features, (B, H).
            attention_mask: 1 for real tokens and 0 for padding, (B, T).
            labels: class indices, (B,).

        Returns:
            ``loss`` (B,); ``logits`` (B, C); ``residual`` = softmax - onehot = ∂loss/∂logits (B, C);
            ``features`` (B, H). The gradient for one example is residualᵀ·features, and residual for the bias.
        """
        features = hidden
        if self.features != "own":
            pooled = pool(hidden, attention_mask, self.features)
            features = pooled * torch.rsqrt((pooled * pooled).mean([-1], keepdim=True))
        logits = torch.matmul(features, self.weight.transpose(0, 1))
        if self.bias is not None:
            logits = logits + self.bias
        log_probabilities = torch.log_softmax(logits, -1)
        loss = -torch.gather(log_probabilities, 1, labels.unsqueeze(-1)).squeeze([-1])
        classes = torch.arange(logits.shape[-1], device=labels.device).unsqueeze(0)
        onehot = (classes == labels.unsqueeze(-1)).to(logits.dtype)
        return loss, logits, torch.exp(log_probabilities) - onehot, features


def pool(hidden: Tensor, attention_mask: Tensor, features: Features) -> Tensor:
    """One vector a text (B, H) of its hidden states (B, T, H), by ``mean``, ``first`` or ``last``."""
    if features == "first":
        return hidden[:, 0]
    if features == "last":
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device).unsqueeze(0)
        last = positions == attention_mask.sum([1], keepdim=True) - 1
        return (hidden * last.unsqueeze(-1).to(hidden.dtype)).sum([1])
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum([1]) / mask.sum([1])


class Classifier(nn.Module):
    """A base model with slices, and a head.

    Args:
        encoder: base model.
        head: classifier on top.
        arguments: further arguments of the base model.
        own: frozen part of the folder's own classifier, which makes the features; None for pooled hidden states.
    """

    def __init__(
        self, encoder: nn.Module, head: Head, arguments: dict[str, Any], own: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.arguments = arguments
        self.own = own

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Outputs of :meth:`Head.forward` for ids and mask (B, T) and labels (B,)."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **self.arguments}
        outputs = self.encoder(**given)
        hidden = outputs.last_hidden_state if self.own is None else self.own(outputs, attention_mask)
        return self.head(hidden, attention_mask, labels)  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """A causal language model with slices; its own output layer is frozen."""

    def __init__(self, encoder: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.arguments = arguments

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Loss of each example and how often its most probable token was right.

        Args:
            input_ids: token ids, (B, T).
            attention_mask: 1 for real tokens and 0 for padding, (B, T).
            labels: token that follows each, (B, T), ``NOT_PREDICTED`` where nothing is predicted; every row predicts
                at least one.

        Returns:
            ``loss`` (B,), the mean over predicted tokens of cross-entropy; ``correct`` (B,), a count.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **self.arguments}
        logits = self.encoder(**given).logits
        predicted = labels > NOT_PREDICTED
        counted = predicted.to(logits.dtype)
        chosen = torch.gather(logits, 2, labels.clamp(min=0).unsqueeze(-1)).squeeze([-1])
        losses = torch.logsumexp(logits, [-1]) - chosen
        loss = (losses * counted).sum([1]) / counted.sum([1])
        right = torch.logical_and(logits.argmax(-1) == labels, predicted)
        return loss, right.to(torch.int64).sum([1])
