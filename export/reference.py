"""The same segments, on the same quantised weights, run by torch: what programs are compared with.

Differentiable in the slices, by ordinary reverse mode, so it also serves as the backpropagation baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from export.capture import HEAD_OUTPUTS, SegmentGraph


class TorchReference:
    """Runs a chain of segments.

    Args:
        segments: in order, quantised or not.
        tensors: every frozen and trainable tensor they name.
    """

    def __init__(self, segments: Sequence[SegmentGraph], tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._segments = segments
        self._modules = [segment.module() for segment in segments]
        self.trainable = tuple(source for segment in segments for source in segment.slices.values())

    def run(
        self, inputs: Mapping[str, Tensor], slices: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Outputs of the head for a batch.

        Args:
            inputs: ``input_ids`` and ``attention_mask`` (B, T), ``labels`` (B,).
            slices: trainable tensors by parameter name, those missing as captured. A slice tensor of shape
                (1, *s) may be given as (B, *s): then each example uses its own values.
        """
        given = {**self.tensors, **(slices or {})}
        flow = dict(inputs)
        for segment, module in zip(self._segments, self._modules, strict=True):
            arguments = [flow[name] for name in segment.values]
            arguments += [given[source] for source in segment.slices.values()]
            arguments += [given[source] for source in segment.weights.values()]
            flow.update(zip(segment.outputs, module(*arguments), strict=True))
        return {name: flow[name] for name in HEAD_OUTPUTS}

    def example_gradients(
        self, inputs: Mapping[str, Tensor], slices: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and, for each slice tensor (1, *s) outside the head, its gradient per example (B, *s)."""
        batch = inputs["labels"].shape[0]
        leaves = {
            name: value.expand(batch, *value.shape[1:]).clone().requires_grad_()
            for name, value in slices.items()
            if not name.startswith("head.")
        }
        with torch.enable_grad():
            loss = self.run(inputs, {**slices, **leaves})["loss"]
            gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        return loss.detach(), dict(zip(leaves, gradients, strict=True))
