"""The same segments, on the same stored weights, run by torch: what programs are compared with.

Gradients of the slices come from ordinary reverse mode, one segment at a time. A segment's weights are in memory only
while it runs, once forwards and once backwards, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from export.capture.segment import SegmentGraph


class TorchReference:
    """Runs a chain of segments.

    Args:
        segments: segments to run, in order, quantised or not.
        tensors: every frozen and trainable tensor they name; frozen ones are asked for each time they are needed.
    """

    def __init__(self, segments: Sequence[SegmentGraph], tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._segments = segments
        self._modules = [segment.module() for segment in segments]
        self.trainable = tuple(
            dict.fromkeys(source for segment in segments for source in segment.slices.values())
        )

    def run(
        self, inputs: Mapping[str, Tensor], slices: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Outputs of the head for a batch.

        Args:
            inputs: ``input_ids`` and ``attention_mask`` (B, T), ``labels`` (B,) or, for language modelling, (B, T).
            slices: trainable tensors by parameter name; those left out keep the values they were captured with. A
                slice tensor of shape (1, *s) may be given as (B, *s): then each example uses its own values.
        """
        flow = dict(inputs)
        for index, segment in enumerate(self._segments):
            flow.update(self._outputs(index, [flow[name] for name in segment.values], self._given(slices)))
        return {name: flow[name] for name in self._segments[-1].outputs}

    def example_gradients(
        self, inputs: Mapping[str, Tensor], slices: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and, for each slice tensor (1, *s) outside the head, its gradient per example (B, *s)."""
        batch = inputs["labels"].shape[0]
        given = self._given(slices)
        kept: list[list[Tensor]] = []
        flow = dict(inputs)
        with torch.no_grad():
            for index, segment in enumerate(self._segments):
                kept.append([flow[name] for name in segment.values])
                flow.update(self._outputs(index, kept[-1], given))
        loss = flow["loss"]
        gradients: dict[str, Tensor] = {}
        bar = torch.ones_like(loss)
        for index in reversed(range(1, len(self._segments))):
            bar = self._backwards(index, kept[index], given, bar, batch, gradients)
        order = [name for name in self.trainable if name in gradients]
        return loss, {name: gradients[name] for name in order}

    def _given(self, slices: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {name: (slices or {}).get(name, self.tensors[name]) for name in self.trainable}

    def _outputs(
        self, index: int, values: Sequence[Tensor], given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        segment = self._segments[index]
        slices = [given[source] for source in segment.slices.values()]
        results = self._modules[index](*values, *slices, *self._weights(segment))
        return dict(zip(segment.outputs, results, strict=True))

    def _backwards(
        self,
        index: int,
        values: Sequence[Tensor],
        given: Mapping[str, Tensor],
        bar: Tensor,
        batch: int,
        gradients: dict[str, Tensor],
    ) -> Tensor:
        """The cotangent of a segment's hidden input; adds to the gradients of its slices, each example's own."""
        segment = self._segments[index]
        sources = list(segment.slices.values())
        hidden = [
            value.detach().requires_grad_() if name == "hidden" else value
            for name, value in zip(segment.values, values, strict=True)
        ]
        leaves = [
            given[s]
            if s.startswith("head.")
            else given[s].expand(batch, *given[s].shape[1:]).clone().requires_grad_()
            for s in sources
        ]
        output = "loss" if "loss" in segment.outputs else "hidden"
        with torch.enable_grad():
            results = self._modules[index](*hidden, *leaves, *self._weights(segment))
            result = results[segment.outputs.index(output)]
            moved = [leaf for leaf in leaves if leaf.requires_grad]
            incoming, *found = torch.autograd.grad(
                result, [hidden[segment.values.index("hidden")], *moved], bar
            )
        named = [source for source, leaf in zip(sources, leaves, strict=True) if leaf.requires_grad]
        for source, gradient in zip(named, found, strict=True):
            gradients[source] = gradients[source] + gradient if source in gradients else gradient
        return incoming

    def _weights(self, segment: SegmentGraph) -> list[Tensor]:
        return [self.tensors[source] for source in segment.weights.values()]
