"""What quantisation does to a model: loss and directional derivatives of the quantised one beside the float one.

Both run in torch, so the rounding of stored weights is all that differs.
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
        plain: on weights as they are in the model's folder. quantised: on weights as they are stored.
        inputs: the model's inputs by name, as :meth:`TorchReference.run` takes them.
        slices: every trainable tensor by parameter name, (1, *s).
        directions: tangents (K, B, *s) of those tensors whose derivatives are compared.
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
    """Loss (B,) and directional derivatives (K, B): a gradient's product with each direction."""
    loss, gradients = reference.example_gradients(inputs, slices)
    products = [(directions[name] * gradient).flatten(2).sum(2) for name, gradient in gradients.items()]
    return loss, torch.stack(products).sum(0)
