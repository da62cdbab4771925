"""What quantisation does to a model: loss and directional derivatives of the quantised one beside the float one.

Both run in torch, so the rounding of stored weights is all that differs. Gradients come from reverse mode a segment at
a time: the forward pass keeps what flows into each segment, the backward pass runs each again (gradient
checkpointing; Chen et al. 2016, arXiv 1604.06174, section 4.1). Only one segment's tensors are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from edge_runtime.package import QuantisationEffect
from export.capture import SegmentGraph

#: Gives a frozen tensor by its stored name, float or quantised.
TensorSource = Callable[[str], Tensor]


def quantisation_effect(
    plain: Sequence[SegmentGraph],
    quantised: Sequence[SegmentGraph],
    tensor: TensorSource,
    inputs: Mapping[str, Tensor],
    slices: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
) -> QuantisationEffect:
    """Compare a model with its quantised form on a batch of real text.

    Args:
        plain: segments as captured. quantised: the same after ``export.quantise_graph.quantise_segment``.
        tensor: gives any frozen tensor that either names.
        inputs: the model's inputs by name, as :meth:`export.reference.TorchReference.run` takes them.
        slices: every trainable tensor by parameter name, (1, *s).
        directions: tangents (K, B, *s) of those tensors whose derivatives are compared.
    """
    loss, jvps = _loss_and_jvps(plain, tensor, inputs, slices, directions)
    found_loss, found_jvps = _loss_and_jvps(quantised, tensor, inputs, slices, directions)
    return QuantisationEffect(
        rows=len(loss),
        loss=float((found_loss - loss).abs().mean() / loss.mean()),
        jvp_cosine=float(torch.nn.functional.cosine_similarity(found_jvps.flatten(), jvps.flatten(), 0)),
    )


def segmentwise_gradients(
    segments: Sequence[SegmentGraph],
    tensor: TensorSource,
    inputs: Mapping[str, Tensor],
    slices: Mapping[str, Tensor],
    wanted: Sequence[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (B,) of a chain of segments, and for each wanted slice tensor (1, *s) its gradient per example (B, *s).

    Args:
        wanted: names of trainable tensors; one that several segments use gets the sum. Others as in
            :func:`quantisation_effect`.
    """
    flow, entering = dict(inputs), []
    with torch.no_grad():
        for segment in segments:
            entering.append({name: flow[name] for name in segment.values})
            flow.update(_run(segment, tensor, entering[-1], slices))
    loss = flow["loss"]
    gradients: dict[str, Tensor] = {}
    cotangent = torch.ones_like(loss)
    holding = [i for i, segment in enumerate(segments) if set(segment.slices.values()) & set(wanted)]
    for index in range(len(segments) - 1, min(holding, default=len(segments)) - 1, -1):
        segment, values = segments[index], dict(entering[index])
        names = [name for name in segment.slices.values() if name in wanted]
        leaves = {name: _per_example(slices[name], len(loss)) for name in names}
        if "hidden" in values:
            values["hidden"] = values["hidden"].detach().requires_grad_()
        with torch.enable_grad():
            result = _run(segment, tensor, values, {**slices, **leaves})
        moved = [*leaves.values(), *([values["hidden"]] if "hidden" in values else [])]
        found = torch.autograd.grad(result["loss" if "loss" in result else "hidden"], moved, cotangent)
        for name, gradient in zip(names, found, strict=False):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        cotangent = found[-1]
    return loss, gradients


def _loss_and_jvps(
    segments: Sequence[SegmentGraph],
    tensor: TensorSource,
    inputs: Mapping[str, Tensor],
    slices: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and directional derivatives (K, B): a gradient's product with each direction."""
    loss, gradients = segmentwise_gradients(segments, tensor, inputs, slices, tuple(directions))
    products = [(directions[name] * gradient).flatten(2).sum(2) for name, gradient in gradients.items()]
    return loss, torch.stack(products).sum(0)


def _run(
    segment: SegmentGraph, tensor: TensorSource, values: Mapping[str, Tensor], slices: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    arguments = [values[name] for name in segment.values]
    arguments += [slices[source] for source in segment.slices.values()]
    arguments += [tensor(source) for source in segment.weights.values()]
    return dict(zip(segment.outputs, segment.module()(*arguments), strict=True))


def _per_example(value: Tensor, batch: int) -> Tensor:
    return value.detach().expand(batch, *value.shape[1:]).clone().requires_grad_()
