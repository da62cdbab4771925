"""The exact gradient of a package's slices, by backpropagation in torch on the same quantised weights."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from edge_runtime.data.batches import Batch
from edge_runtime.package.slices import Values, key
from export.model.slices import slice_and_tensor
from export.packaging.self_check import torch_inputs
from export.packaging.torch_reference import TorchReference


def slice_gradient(
    reference: TorchReference, batch: Batch, values: Values, slices: Collection[str]
) -> tuple[dict[str, Tensor], Values]:
    """Run a batch in torch, forwards and back.

    Args:
        reference: segments to run.
        batch: examples to run them on.
        values: values of every slice and of the head, by flat name.
        slices: names of the slices whose gradient is wanted.

    Returns:
        The head's outputs; and the gradient of the mean loss, by flat name.
    """
    flat = {name: key(*slice_and_tensor(name)) for name in reference.trainable}
    tensors = {name: torch.from_numpy(values[flat_name]) for name, flat_name in flat.items()}
    wanted = [name for name in flat if slice_and_tensor(name)[0] in slices]
    for name in wanted:
        tensors[name] = tensors[name].clone().requires_grad_()
    outputs = reference.run(torch_inputs(batch), tensors)
    slopes = torch.autograd.grad(outputs["loss"].mean(), [tensors[name] for name in wanted])
    return outputs, {flat[name]: slope.numpy() for name, slope in zip(wanted, slopes, strict=True)}
