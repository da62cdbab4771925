"""Four-bit levels of a matrix: for each block the scale and the zero point of least squared error, found by search.

A block w of weights becomes (q + z) in 0 … 15 with w ≈ s · q. Rounding to nearest puts the block's extremes on the
ends of the range; here the range is also tried wider and narrower, at both integer zero points about its middle. For
given q the best scale is s = ⟨q, w⟩ / ⟨q, q⟩ and leaves ‖w‖² - ⟨q, w⟩² / ⟨q, q⟩, so the candidate with the largest
⟨q, w⟩² / ⟨q, q⟩ wins (least squares; no source needed). It is rounded once more with its own best scale, which cannot
be worse. Why not a library's method, and what it gains: docs/decisions/0012-quantisation.md.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

#: The largest level of four bits.
TOP = 15
#: Widths of the range that are tried, over the block's own.
WIDTHS = (1.08, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
#: Weights searched at a time: their working copies fit a core's cache, and torch does not split so few over its own
#: threads, whose barriers cost far more than the work.
WEIGHTS_AT_A_TIME = 1 << 15
_TINY = 1e-30


def quantise_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, scales and zero points of a matrix's blocks. Rows do not influence each other.

    Args:
        weight: floating-point matrix (N, K).
        block: number of inputs that share a scale; divides K.

    Returns:
        Levels 0 to 15, uint8 (N, K/block, block); scales, float32 (N, K/block); zero points 0 to 15, uint8
        (N, K/block). A block of zeros has scale zero.
    """
    rows, columns = weight.shape
    levels = torch.empty(rows, columns // block, block, dtype=torch.uint8)
    scales = torch.empty(rows, columns // block)
    zero_points = torch.empty(rows, columns // block, dtype=torch.uint8)
    step = max(1, WEIGHTS_AT_A_TIME // columns)

    def fill(start: int) -> None:
        part = slice(start, start + step)
        blocks = weight[part].float().reshape(-1, columns // block, block)
        levels[part], scales[part], zero_points[part] = _search(blocks)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, rows, step)))
    return levels, scales, zero_points


def _search(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    high = blocks.amax(-1, keepdim=True).clamp(min=0)
    best = torch.full_like(low, -1)
    scale, zero = torch.zeros_like(low), torch.zeros_like(low)
    for width in WIDTHS:
        tried = ((high - low) * (width / TOP)).clamp(min=_TINY)
        middle = (TOP - (high + low) / tried) / 2
        for candidate in (middle.floor().clamp(0, TOP), middle.ceil().clamp(0, TOP)):
            along, square = _products(blocks, _rounded(blocks, tried, candidate))
            explained = along * along / square.clamp(min=1)
            better = explained > best
            best = torch.where(better, explained, best)
            scale = torch.where(better, along / square.clamp(min=1), scale)
            zero = torch.where(better, candidate, zero)
    rounded = _rounded(blocks, scale.clamp(min=_TINY), zero)
    along, square = _products(blocks, rounded)
    scale = along / square.clamp(min=1)
    return (rounded + zero).to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8)


def _rounded(blocks: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Levels around the zero point, as float32."""
    return torch.clamp((blocks * (1 / scale)).round_(), -zero, TOP - zero)


def _products(blocks: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """⟨q, w⟩ and ⟨q, q⟩ of each block; the latter is a whole number."""
    along = (rounded * blocks).sum(-1, keepdim=True)
    return along, (rounded * rounded).sum(-1, keepdim=True)
