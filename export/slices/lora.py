"""LoRA: W x + (alpha / r)·B·A·x with trained A and B (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edge_runtime.package.slices import FloatArray
from export.slices.sliced_linear import Frozen, Pair, SlicedLinear, SliceOptions, checked_rank, require_tokens


class LoraLinear(SlicedLinear):
    """A linear layer with a LoRA slice: ``A`` (1, r, in) at random, ``B`` (1, out, r) at zero, a frozen ``scale``."""

    TRAINED = ("A", "B")
    scale: Tensor

    def __init__(
        self, name: str, linear: nn.Linear, options: SliceOptions, generator: torch.Generator
    ) -> None:
        super().__init__(linear)
        del name
        rank = checked_rank(linear, options)
        bound = linear.in_features**-0.5
        a = torch.rand(1, rank, linear.in_features, generator=generator) * 2 * bound - bound
        self.register_buffer("scale", torch.tensor(options.alpha / rank))
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(torch.zeros(1, linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + scale·B·A·x; see :meth:`export.slices.sliced_linear.SlicedLinear.forward`."""
        require_tokens(x)
        inner = torch.matmul(x, self.A.transpose(-1, -2))
        return torch.add(self.linear(x), torch.matmul(inner, self.B.transpose(-1, -2)) * self.scale)

    @staticmethod
    def options_of(shapes: Mapping[str, tuple[int, ...]]) -> SliceOptions:
        """See :meth:`export.slices.sliced_linear.SlicedLinear.options_of`."""
        rank = shapes["A"][1]
        return SliceOptions("lora", rank=rank, alpha=float(rank))

    @classmethod
    def pair(cls, name: str, values: Mapping[str, FloatArray], frozen: Frozen) -> Pair:
        """The pair itself."""
        del name
        return values["A"][0], values["B"][0], float(frozen("scale"))

    @classmethod
    def start(cls, where: str, target: str, pair: Pair, frozen: Frozen) -> dict[str, FloatArray]:
        """The pair itself; the package's scale was taken from the adapter."""
        del where, target, frozen
        a, b, _ = pair
        return {"A": a[None], "B": b[None]}
