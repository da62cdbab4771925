"""Block-wise int8 for frozen weights, and the operators that use them.

A weight row is cut into blocks of ``BLOCK`` inputs; each block stores uint8 levels around 128 and one
float32 scale: w ≈ (level - 128) · scale with scale = max|w| / 127. This is the layout of ONNX Runtime's
``MatMulNBits`` (levels of shape (N, K/BLOCK, BLOCK)) and ``GatherBlockQuantized`` (levels (N, K)), both with
8 bits and the implicit zero point 128.

Both are torch custom operators, so that a captured graph can name them, torch can run them on the same
quantised weights (the reference in tests), and lowering can map each to one node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 32
ZERO_POINT = 128


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix block-wise along its rows.

    Args:
        weight: float32 of shape (N, K); K must be a multiple of BLOCK.

    Returns:
        Levels, uint8 of shape (N, K/BLOCK, BLOCK), and scales, float32 of shape (N, K/BLOCK).

    Raises:
        ValueError: K is not a multiple of BLOCK.
    """
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"row length {columns} is not a multiple of {BLOCK}")
    blocks = weight.reshape(rows, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(-1) / 127
    safe = torch.where(scales == 0, torch.ones_like(scales), scales)
    levels = torch.round(blocks / safe[:, :, None]) + ZERO_POINT
    return levels.to(torch.uint8), scales


def dequantise(levels: Tensor, scales: Tensor) -> Tensor:
    """The float32 matrix (N, K) that the kernels compute with."""
    weight = (levels.to(scales.dtype) - ZERO_POINT) * scales[:, :, None]
    return weight.reshape(levels.shape[0], -1)


@torch.library.custom_op("edge::frozen_linear", mutates_args=())
def _frozen_linear(
    x: Tensor, levels: Tensor, scales: Tensor, bias: Tensor | None, accuracy_level: int
) -> Tensor:
    # accuracy_level is the engine's business; torch is the exact reference.
    return torch.nn.functional.linear(x, dequantise(levels, scales).to(x.dtype), bias)


@_frozen_linear.register_fake
def _(x: Tensor, levels: Tensor, scales: Tensor, bias: Tensor | None, accuracy_level: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], levels.shape[0]))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    levels, scales = ctx.saved_tensors
    return gradient @ dequantise(levels, scales).to(gradient.dtype), None, None, None, None


# Reverse mode is for references only: self-check, tests and the backpropagation baseline.
_frozen_linear.register_autograd(_backward, setup_context=_keep_weight)


@torch.library.custom_op("edge::frozen_linear_transposed", mutates_args=())
def _frozen_linear_transposed(gradient: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    return gradient @ dequantise(levels, scales).to(gradient.dtype)


@_frozen_linear_transposed.register_fake
def _(gradient: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], levels.shape[1] * levels.shape[2]))


@torch.library.custom_op("edge::frozen_embedding", mutates_args=())
def _frozen_embedding(levels: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    blocks = levels[index].reshape(*index.shape, -1, BLOCK).to(scales.dtype)
    rows: Tensor = (blocks - ZERO_POINT) * scales[index][..., None]
    return rows.flatten(-2)


@_frozen_embedding.register_fake
def _(levels: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    return scales.new_empty((*index.shape, levels.shape[1]))


frozen_linear = torch.ops.edge.frozen_linear.default
#: Cotangent (..., N) of a frozen product to that of its input (..., K): the same stored weight, not transposed in it.
frozen_linear_transposed = torch.ops.edge.frozen_linear_transposed.default
frozen_embedding = torch.ops.edge.frozen_embedding.default
