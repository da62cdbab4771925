"""What quantisation does to a model: loss and directional derivatives of the quantised one beside the float one.

Both run in torch, so that they differ by nothing but the rounding of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edge_runtime.package.manifest import QuantisationEffect
from export.packaging.torch_reference import TorchReference


def quantisation_effect(
    plain: TorchReference,
    quantised: TorchReference,
    inputs: Mapping[str, Tensor],
    slices: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
) -> QuantisationEffect:
    """Compare a model with its quantised form on a batch of real text.

    Args:
        plain: model with the weights of its folder.
        quantised: same model with the weights that the package stores.
        inputs: inputs of the model, by name: ``input_ids``, ``attention_mask`` and ``labels``.
        slices: every trainable tensor by parameter name, each of shape (1, *s).
        directions: tangents (K, B, *s) of the tensors along which derivatives are compared, by parameter name.
    """
    loss, jvps = _loss_and_jvps(plain, inputs, slices, directions)
    found_loss, found_jvps = _loss_and_jvps(quantised, inputs, slices, directions)
    return QuantisationEffect(
        rows=len(loss),
        loss=float((found_loss - loss).abs().mean() / loss.mean()),
        jvp_cosine=float(torch.nn.functional.cosine_similarity(found_jvps.flatten(), jvps.flatten(), 0)),
    )


def _loss_and_jvps(
    reference: TorchReference,
    inputs: Mapping[str, Tensor],
    slices: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and directional derivatives (K, B): each direction's product with the gradient of its tensor."""
    loss, gradients = reference.example_gradients(inputs, slices)
    products = [(direction * gradients[name]).flatten(2).sum(2) for name, direction in directions.items()]
    return loss, torch.stack(products).sum(0)
