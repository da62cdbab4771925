"""Sparse slices: trained changes of chosen entries of the weight itself; all other entries never move.

In sparse fine-tuning by lottery tickets the entries that move most in a warm-up are trained alone (Ansell et al. 2022,
arXiv 2110.07560), which "Less is Fed More" (FedSparseNet, CustomNLP4U 2024) brings to federated learning. That paper's
rule for the mask was not at hand: the choice made here is a stand-in. Each output (row of the weight) keeps its k
entries of highest score, k = max(1, round(density·in)), because scores are compared within an output, as Wanda does
(Sun et al. 2023, arXiv 2306.11695, section 3); a global choice of the highest scores of a whole matrix would give some
outputs many entries and others none, and its values no rectangle.

What is added is Σ_j values[j]·x[index[j]], one gathered column of every output at a time: no more than a few tensors
(B, T, out) are alive, whatever k is, and directions per example stay as small as the values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edge_runtime.errors import ModelError
from edge_runtime.package.slices import FloatArray
from export.slices.sliced_linear import Frozen, Pair, SlicedLinear, SliceOptions, require_tokens

#: Most entries of an output. Each takes three operators of a program, and beyond these a LoRA slice is smaller.
MOST_ENTRIES = 64


class SparseLinear(SlicedLinear):
    """A linear layer with a sparse slice: ``values`` (1, k, out) at zero, and a frozen ``index`` (k, out), int32.

    ``index[j, o]`` is the input of the j-th trained entry of output o, ascending in j.
    """

    TRAINED = ("values",)
    index: Tensor

    def __init__(
        self, name: str, linear: nn.Linear, options: SliceOptions, generator: torch.Generator
    ) -> None:
        super().__init__(linear)
        out, inputs = linear.out_features, linear.in_features
        count = options.entries or entries_of(options.density, inputs)
        if name in options.scores:
            index = highest(options.scores[name], count)
        else:
            index = highest(torch.rand(out, inputs, generator=generator), count)
        self.register_buffer("index", index)
        self.values = nn.Parameter(torch.zeros(1, count, out))

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + S x; see :meth:`export.slices.sliced_linear.SlicedLinear.forward`."""
        require_tokens(x)
        y: Tensor = self.linear(x)
        values = self.values.unsqueeze(2)
        for entry in range(len(self.index)):
            y = torch.add(y, torch.index_select(x, -1, self.index[entry]) * values[:, entry])
        return y

    @staticmethod
    def options_of(shapes: Mapping[str, tuple[int, ...]]) -> SliceOptions:
        """See :meth:`export.slices.sliced_linear.SlicedLinear.options_of`."""
        return SliceOptions("sparse", entries=shapes["values"][1])

    @classmethod
    def pair(cls, name: str, values: Mapping[str, FloatArray], frozen: Frozen) -> Pair:
        """See :meth:`export.slices.sliced_linear.SlicedLinear.pair`; there is none."""
        del values, frozen
        raise ModelError(
            f"slice {name} is sparse, which is no product of two small factors as an adapter holds; take edge-export "
            "merge, which writes the whole model"
        )

    @classmethod
    def change(
        cls, name: str, values: Mapping[str, FloatArray], frozen: Frozen, shape: tuple[int, int]
    ) -> Tensor:
        """The values at their entries, and zero elsewhere."""
        del name
        whole = torch.zeros(shape)
        index = torch.from_numpy(frozen("index")).long()
        return whole.scatter_(1, index.T, torch.from_numpy(values["values"][0]).T)

    @classmethod
    def start(cls, where: str, target: str, pair: Pair, frozen: Frozen) -> dict[str, FloatArray]:
        """See :meth:`export.slices.sliced_linear.SlicedLinear.start`; no pair can be started from."""
        del pair, frozen
        raise ModelError(
            f"{where} adapts {target} by a product of two factors, which a sparse slice cannot hold; merge it into the "
            "model first, or start from it with --slice lora"
        )


def entries_of(density: float, inputs: int) -> int:
    """The number k of trained entries of each output of a layer with so many inputs.

    Raises:
        ModelError: it is more than :data:`MOST_ENTRIES`.
    """
    count = max(1, round(density * inputs))
    if count > MOST_ENTRIES:
        raise ModelError(
            f"--density {density:g} is {count} entries of each output of a layer with {inputs} inputs, limit "
            f"{MOST_ENTRIES}; take at most --density {MOST_ENTRIES / inputs:.3g}, or --slice lora"
        )
    return count


def highest(scores: Tensor, count: int) -> Tensor:
    """The index (k, out) of each output's entries of highest score, of scores (out, in); ascending, int32."""
    chosen = scores.topk(count, dim=1, sorted=False).indices
    return chosen.sort(dim=1).values.T.to(torch.int32).contiguous()
