"""LoRA-XS: W x + U·R·V·x, a trained core R between frozen factors (Bałazy et al. 2024, arXiv 2405.17604, section 3).

U = (the leading left singular vectors of W times singular values times alpha / r) and V = the right ones. Where it is
known what enters the layer, the factors may be those of W C^½ instead (:func:`whitened_factors`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.errors import ModelError
from edge_runtime.package.slices import FloatArray
from export.slices.sliced_linear import Frozen, Pair, SlicedLinear, SliceOptions, checked_rank, require_tokens

#: Sides up to which the singular value decomposition is exact; beyond, its leading part is found by iteration.
EXACT_SIDE = 1024
#: Directions beyond the rank, and power iterations (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.4).
OVERSAMPLING, POWER_ITERATIONS = 12, 8
#: Share of the mean variance that is added to every input's, so that inputs which never vary can be divided by it.
RIDGE = 1e-3
#: Largest part of an update, by Frobenius norm, that may lie outside a slice's span.
SPAN_TOLERANCE = 1e-3


class LoraXsLinear(SlicedLinear):
    """A linear layer with a LoRA-XS slice: ``core`` (1, r, r) at zero, frozen ``up`` (out, r) and ``down`` (r, in)."""

    TRAINED = ("core",)
    FROZEN = ("up", "down")
    up: Tensor
    down: Tensor

    def __init__(
        self, name: str, linear: nn.Linear, options: SliceOptions, generator: torch.Generator
    ) -> None:
        super().__init__(linear)
        del generator
        self._moment = options.moments.get(name)
        rank = checked_rank(linear, options)
        self.scale_value = options.alpha / rank
        self.register_buffer("up", torch.empty(linear.out_features, rank, device="meta"))
        self.register_buffer("down", torch.empty(rank, linear.in_features, device="meta"))
        self.core = nn.Parameter(torch.zeros(1, rank, rank))

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + up·core·down·x; see :meth:`export.slices.sliced_linear.SlicedLinear.forward`."""
        require_tokens(x)
        inner = torch.matmul(nn.functional.linear(x, self.down), self.core.transpose(-1, -2))
        return torch.add(self.linear(x), nn.functional.linear(inner, self.up))

    def frozen_of(self, weight: Tensor) -> dict[str, Tensor]:
        """The factors of the layer's weight."""
        rank = self.core.shape[-1]
        if self._moment is None:
            up, down = factors(weight, rank, self.scale_value)
        else:
            up, down = whitened_factors(weight, self._moment, rank, self.scale_value)
        return {"up": up, "down": down}

    @staticmethod
    def options_of(shapes: Mapping[str, tuple[int, ...]]) -> SliceOptions:
        """See :meth:`export.slices.sliced_linear.SlicedLinear.options_of`."""
        rank = shapes["core"][-1]
        return SliceOptions("lora_xs", rank=rank, alpha=float(rank))

    @classmethod
    def pair(cls, name: str, values: Mapping[str, FloatArray], frozen: Frozen) -> Pair:
        """B = up·core and A = down with scale 1: ``up`` carries singular values and alpha / r."""
        del name
        return frozen("down"), frozen("up") @ values["core"][0], 1.0

    @classmethod
    def start(cls, where: str, target: str, pair: Pair, frozen: Frozen) -> dict[str, FloatArray]:
        """The core R with up·R·down = scale·B·A, by least squares; there is one if the pair is in their span."""
        a, b, _ = pair
        up, down = frozen("up"), frozen("down")
        if (b.shape[0], a.shape[1]) != (up.shape[0], down.shape[1]):
            raise ModelError(
                f"{where} has A {a.shape} and B {b.shape} for {target}, whose weight is "
                f"({up.shape[0]}, {down.shape[1]}); is it for another model?"
            )
        core, outside = fit_core(pair, up, down)
        if outside > SPAN_TOLERANCE:
            raise ModelError(
                f"{outside:.2g} of {where}'s update of {target} lies outside the span of its LoRA-XS slice, "
                f"limit {SPAN_TOLERANCE:g}; start from it with --slice lora"
            )
        return {"core": core[None]}


def factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """LoRA-XS's frozen factors of a weight (out, in): up = U·S·scale (out, r) and down = Vᵀ (r, in), float32.

    The leading ``rank`` singular triplets: exact for small matrices, by seeded subspace iteration for large ones.
    """
    left, singular, right = _leading(weight, rank)
    return (left * singular * scale).float().contiguous(), right.float().contiguous()


def whitened_factors(weight: Tensor, moment: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors by what enters the layer: the leading singular triplets U S V^T of W C^½, C the second moment of inputs.

    ``up`` = U·S, (out, r), and ``down`` = V^T·C^-½, (r, in), so that what enters the core has one variance in every
    direction. Compression whitens inputs in this way (Wang et al. 2024, SVD-LLM, arXiv 2403.07378, section 3.1); here
    it gives a slice its span. ``up`` is scaled so that the core's entries move the output, over all of them, as much as
    those of :func:`factors` do: one learning rate then suits both.

    Args:
        weight: the layer's weight, (out, in).
        moment: mean of x x^T over what enters it, (in, in).
        rank: inner side r.
        scale: alpha / r.
    """
    inputs = moment.double()
    inputs = inputs + RIDGE * inputs.trace() / len(inputs) * torch.eye(len(inputs), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(inputs)
    left, singular, right = _leading(weight.double() @ (vectors * values.sqrt()) @ vectors.T, rank)
    up, down = left.double() * singular.double(), right.double() @ (vectors * values.rsqrt()) @ vectors.T
    own_up, own_down = (each.double() for each in factors(weight, rank, 1.0))
    size = moved(own_up, own_down, moment) / moved(up, down, moment)
    return (up * size * scale).float().contiguous(), down.float().contiguous()


def moved(up: Tensor, down: Tensor, moment: Tensor) -> Tensor:
    """Root mean square, over the core's entries, of what a unit in each moves the layer's output by.

    Args:
        up: (out, r), float64.
        down: (r, in), float64.
        moment: second moment of what enters the layer, (in, in).
    """
    inner = (down @ moment.double() @ down.T).diagonal()
    return (up.square().sum(dim=0)[:, None] * inner[None]).mean().sqrt()


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if min(matrix.shape) <= EXACT_SIDE:
        left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        left, singular, right = _leading_triplets(matrix.float(), rank)
    return left[:, :rank], singular[:rank], right[:rank]


def _leading_triplets(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(weight.shape[1], rank + OVERSAMPLING, generator=generator)
    for _ in range(POWER_ITERATIONS):
        basis, _ = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis)[0])
    left, singular, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    return left, singular, right @ basis.T


def fit_core(pair: Pair, up: FloatArray, down: FloatArray) -> tuple[FloatArray, float]:
    """The core (r, r) nearest to scale·B·A, and the part of the update that it misses, by Frobenius norm (0 to 1).

    Nothing of the size of the layer's weight is formed.
    """
    a, b = pair[0].astype(np.float64), pair[2] * pair[1].astype(np.float64)
    left, right = up.astype(np.float64), down.astype(np.float64)
    core = (np.linalg.pinv(left) @ b) @ (a @ np.linalg.pinv(right))
    missed = _norm(np.hstack([b, -left @ core]), np.vstack([a, right]))
    whole = _norm(b, a)
    return core.astype(np.float32), missed / whole if whole else 0.0


def _norm(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Frobenius norm of left·right, from the triangular factors of both."""
    return float(np.linalg.norm(np.linalg.qr(left).R @ np.linalg.qr(right.T).R.T))
