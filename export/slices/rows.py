"""Rows: chosen rows of the weight are trained, others are chosen from time to time (GRASS, arXiv 2406.17660).

The paper's projection P picks r of the m rows of a gradient and scales each; here Pᵀ is ``place``, and its product with
the trained ``rows`` is what the picked rows move by. What rows that were chosen before have moved by stands in
``moved``. A fresh slice picks rows at random without scale and changes nothing; a run that trains chooses its own
(:mod:`coordinator.aggregation.rows`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from edge_runtime.errors import ModelError
from edge_runtime.package.slices import FloatArray
from export.slices.sliced_linear import Frozen, Pair, SlicedLinear, SliceOptions, require_tokens


class RowsLinear(SlicedLinear):
    """A linear layer of which r rows are trained: ``rows`` (1, r, in) and ``moved`` (1, out, in) at zero, ``place``
    (1, out, r) with a one in each column.
    """

    TRAINED = ("rows", "place", "moved")

    def __init__(
        self, name: str, linear: nn.Linear, options: SliceOptions, generator: torch.Generator
    ) -> None:
        super().__init__(linear)
        del name
        out, inputs = linear.out_features, linear.in_features
        if options.rank > out:
            raise ModelError(
                f"--rank {options.rank} asks for more rows than the {out} of the target layer; choose a smaller --rank"
            )
        chosen = torch.randperm(out, generator=generator)[: options.rank].sort().values
        place = torch.zeros(1, out, options.rank)
        place[0, chosen, torch.arange(options.rank)] = 1
        self.rows = nn.Parameter(torch.zeros(1, options.rank, inputs))
        self.place = nn.Parameter(place)
        self.moved = nn.Parameter(torch.zeros(1, out, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + moved·x + place·rows·x; see :meth:`export.slices.sliced_linear.SlicedLinear.forward`."""
        require_tokens(x)
        inner = torch.matmul(x, self.rows.transpose(-1, -2))
        y = self.linear(x) + torch.matmul(x, self.moved.transpose(-1, -2))
        return torch.add(y, torch.matmul(inner, self.place.transpose(-1, -2)))

    @staticmethod
    def options_of(shapes: Mapping[str, tuple[int, ...]]) -> SliceOptions:
        """See :meth:`export.slices.sliced_linear.SlicedLinear.options_of`."""
        return SliceOptions("rows", rank=shapes["rows"][1])

    @classmethod
    def pair(cls, name: str, values: Mapping[str, FloatArray], frozen: Frozen) -> Pair:
        """See :meth:`export.slices.sliced_linear.SlicedLinear.pair`; there is none."""
        del values, frozen
        raise ModelError(
            f"slice {name} trains rows, which are no product of two small factors as an adapter holds; take "
            "edge-export merge, which writes the whole model"
        )

    @classmethod
    def change(
        cls, name: str, values: Mapping[str, FloatArray], frozen: Frozen, shape: tuple[int, int]
    ) -> Tensor:
        """What the chosen rows have moved by, and what rows chosen before have."""
        del name, frozen, shape
        return torch.from_numpy(np.asarray(values["moved"][0] + values["place"][0] @ values["rows"][0]))

    @classmethod
    def start(cls, where: str, target: str, pair: Pair, frozen: Frozen) -> dict[str, FloatArray]:
        """See :meth:`export.slices.sliced_linear.SlicedLinear.start`; no pair can be started from."""
        del pair, frozen
        raise ModelError(
            f"{where} adapts {target} by a product of two factors; merge it into the model first and train its rows, "
            "or start from it with --slice lora"
        )
