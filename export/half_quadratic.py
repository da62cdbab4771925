"""Four-bit levels of a matrix, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

#: The largest level of four bits.
TOP = 15


def quantise_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, scales and zero points of a matrix's blocks, by rounding to nearest.

    Args:
        weight: floating point of shape (N, K). block: inputs that share a scale; divides K.

    Returns:
        Levels 0 to 15, uint8 (N, K); scales, float32 (N, K/block); zero points 0 to 15, uint8 (N, K/block).
    """
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, columns // block, block)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = (high - low) / TOP
    safe = torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = torch.round(-low / safe)
    levels = (torch.round(blocks / safe[:, :, None]) + zeros[:, :, None]).clamp(0, TOP)
    return levels.to(torch.uint8).reshape(rows, columns // block, block), scales, zeros.to(torch.uint8)
