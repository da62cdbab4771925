"""How frozen matrices are stored, and the operators that use them.

A matrix (N outputs, K inputs) is cut along its inputs into blocks. Each block has one float32 scale; a weight is
(level - zero point) · scale. Two formats, both ONNX Runtime's own:

* ``int8``: blocks of ``BLOCK``; levels uint8 (N, K/BLOCK, BLOCK) around the implicit zero point 128, scale
  max|w| / 127. An embedding has the same bytes as (N, K).
* ``int4``: blocks of ``INT4_BLOCK``; levels from 0 to 15, two in a byte with the even one low, uint8
  (N, K/INT4_BLOCK, INT4_BLOCK/2); zero points packed the same way along a row, uint8 (N, ceil(K/INT4_BLOCK/2)).

Both are torch custom operators, so that a captured graph can name them, torch can run them on the same
quantised weights (the reference in tests), and lowering can map each to one node.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from export.quantisation.block_search import quantise_blocks

BLOCK = 32
ZERO_POINT = 128
#: Inputs that share a scale and a zero point in int4 (docs/decisions/0012-quantisation.md).
INT4_BLOCK = 32

#: What a matrix is used as. An embedding is int8 whatever is asked.
MatrixKind = Literal["linear", "embedding"]
#: Shape and element type of a stored tensor.
PartSpec = tuple[tuple[int, ...], torch.dtype]


def stored_format(
    kind: MatrixKind, quantisation: str, shape: tuple[int, ...]
) -> Literal["int8", "int4"] | None:
    """The format a matrix is stored in; None where it stays float32.

    A linear layer's matrix stays float if it has fewer than ``BLOCK`` rows, as a slice's factors do. A row that is not
    whole blocks of int4 is stored in int8, and in float if it is not whole blocks of that either.

    Args:
        kind: what the matrix is used as.
        quantisation: format asked for: ``int8``, ``int4`` or ``none``.
        shape: shape of the matrix, (N, K).
    """
    rows, columns = shape
    if quantisation == "none" or columns % BLOCK or (kind == "linear" and rows < BLOCK):
        return None
    return "int4" if quantisation == "int4" and kind == "linear" and columns % INT4_BLOCK == 0 else "int8"


def stored_parts(kind: MatrixKind, quantisation: str, shape: tuple[int, ...]) -> dict[str, PartSpec]:
    """Shapes and types of the tensors a matrix is stored as, by suffix; none where it stays float32.

    Args:
        kind: what the matrix is used as.
        quantisation: format asked for: ``int8``, ``int4`` or ``none``.
        shape: shape of the matrix, (N, K).
    """
    chosen = stored_format(kind, quantisation, shape)
    rows, columns = shape
    if chosen is None:
        return {}
    if chosen == "int8":
        blocks = columns // BLOCK
        levels = (rows, columns) if kind == "embedding" else (rows, blocks, BLOCK)
        return {"levels": (levels, torch.uint8), "scales": ((rows, blocks), torch.float32)}
    blocks = columns // INT4_BLOCK
    return {
        "levels": ((rows, blocks, INT4_BLOCK // 2), torch.uint8),
        "scales": ((rows, blocks), torch.float32),
        "zero_points": ((rows, -(-blocks // 2)), torch.uint8),
    }


def quantise(weight: Tensor, kind: MatrixKind, quantisation: str) -> dict[str, Tensor]:
    """The tensors a matrix is stored as, of the shapes and types that :func:`stored_parts` gives.

    Args:
        weight: floating-point matrix (N, K).
        kind: what the matrix is used as.
        quantisation: format asked for: ``int8`` or ``int4``.

    Raises:
        ValueError: a matrix of this kind and shape stays float32.
    """
    chosen = stored_format(kind, quantisation, tuple(weight.shape))
    if chosen is None:
        raise ValueError(f"a {kind} of shape {tuple(weight.shape)} is not quantised to {quantisation}")
    if chosen == "int8":
        levels, scales = quantise_rows(weight)
        return {"levels": levels.flatten(1) if kind == "embedding" else levels, "scales": scales}
    levels, scales, zero_points = quantise_blocks(weight, INT4_BLOCK)
    return {"levels": _pack(levels), "scales": scales, "zero_points": _pack(zero_points)}


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix to int8, block-wise along its rows.

    Args:
        weight: floating-point matrix (N, K); K must be a multiple of BLOCK.

    Returns:
        Levels, uint8 of shape (N, K/BLOCK, BLOCK), and scales, float32 of shape (N, K/BLOCK).

    Raises:
        ValueError: K is not a multiple of BLOCK.
    """
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"row length {columns} is not a multiple of {BLOCK}")
    blocks = weight.float().reshape(rows, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(-1) / 127
    safe = torch.where(scales == 0, torch.ones_like(scales), scales)
    levels = torch.round(blocks / safe[:, :, None]) + ZERO_POINT
    return levels.to(torch.uint8), scales


def dequantise(levels: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Tensor:
    """The float32 matrix (N, K) that the kernels compute with.

    Args:
        levels: levels with three axes, (N, blocks, bytes of a block).
        scales: scales, (N, blocks).
        zero_points: packed zero points of int4; None for int8.
    """
    if zero_points is None:
        centred = levels.to(scales.dtype) - ZERO_POINT
    else:
        zeros = _unpack(zero_points)[:, : levels.shape[1]]
        centred = _unpack(levels).to(scales.dtype) - zeros.to(scales.dtype)[:, :, None]
    return (centred * scales[:, :, None]).reshape(levels.shape[0], -1)


def _pack(levels: Tensor) -> Tensor:
    """Two 4-bit levels in a byte along the last axis, the even one low; an odd count is filled up with zero."""
    if levels.shape[-1] % 2:
        levels = torch.nn.functional.pad(levels, (0, 1))
    return levels[..., ::2] | (levels[..., 1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


@torch.library.custom_op("edge::frozen_linear", mutates_args=())
def _frozen_linear(
    x: Tensor,
    levels: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    accuracy_level: int,
) -> Tensor:
    # accuracy_level is the engine's business; torch is the exact reference.
    return torch.nn.functional.linear(x, dequantise(levels, scales, zero_points).to(x.dtype), bias)


@_frozen_linear.register_fake
def _(
    x: Tensor,
    levels: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    accuracy_level: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], levels.shape[0]))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    weight = dequantise(*ctx.saved_tensors)
    return gradient @ weight.to(gradient.dtype), None, None, None, None, None


# Reverse mode is for references only: self-check, tests and the backpropagation baseline.
_frozen_linear.register_autograd(_backward, setup_context=_keep_weight)


@torch.library.custom_op("edge::frozen_linear_transposed", mutates_args=())
def _frozen_linear_transposed(
    gradient: Tensor, levels: Tensor, scales: Tensor, zero_points: Tensor | None
) -> Tensor:
    return gradient @ dequantise(levels, scales, zero_points).to(gradient.dtype)


@_frozen_linear_transposed.register_fake
def _(gradient: Tensor, levels: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
    inputs_in_a_byte = 1 if zero_points is None else 2
    return gradient.new_empty((*gradient.shape[:-1], levels.shape[1] * levels.shape[2] * inputs_in_a_byte))


@torch.library.custom_op("edge::frozen_embedding", mutates_args=())
def _frozen_embedding(levels: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    blocks = levels[index].reshape(*index.shape, -1, BLOCK).to(scales.dtype)
    rows: Tensor = (blocks - ZERO_POINT) * scales[index][..., None]
    return rows.flatten(-2)


@_frozen_embedding.register_fake
def _(levels: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    return scales.new_empty((*index.shape, levels.shape[1]))


frozen_linear = torch.ops.edge.frozen_linear.default
#: Takes the cotangent (..., N) of a frozen product to that of its input (..., K), on the same stored weight.
frozen_linear_transposed = torch.ops.edge.frozen_linear_transposed.default
frozen_embedding = torch.ops.edge.frozen_embedding.default
