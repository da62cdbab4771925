"""What every kind of slices is to the exporter: one class, which names its tensors and says what becomes of them.

A kind is a module of this folder and a row of :mod:`export.slices.kinds`. It says what the slice computes
(:meth:`SlicedLinear.forward`), what is made of the frozen weight (:meth:`SlicedLinear.frozen_of`), and how values turn
into a change of that weight, for peft and for merging, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edge_runtime.errors import ModelError
from edge_runtime.package.slices import FloatArray

#: Gives a frozen tensor of a slice by its name within the slice, as programs compute with it.
Frozen = Callable[[str], FloatArray]
#: LoRA's A (r, in), B (out, r) and scale; the change of the layer's weight is scale·B·A.
Pair = tuple[FloatArray, FloatArray, float]


@dataclass(frozen=True)
class SliceOptions:
    """Which slices to attach.

    Attributes:
        kind: name of the kind (:mod:`export.slices.kinds`).
        rank: inner side r of a slice.
        alpha: numerator of the scale; the update is multiplied by alpha / rank.
        targets: modules to adapt, as in ``peft``'s ``target_modules``: a name or a dotted suffix of it, or
            ``all-linear`` alone. Empty means the layers that make queries and values (``export.model.attention``).
        seed: seed of everything that a slice begins with at random.
        density: share of a layer's entries that a sparse slice trains.
        entries: number of them for each output, instead of what ``density`` says; 0 for that.
        scores: scores (out, in) of each target's entries, of which a sparse slice takes the highest; of a target
            without scores it takes entries at random.
        moments: second moments (in, in) of what enters each target, of which LoRA-XS makes its factors; of a target
            without them it makes those of the weight alone.
    """

    kind: str = "lora_xs"
    rank: int = 4
    alpha: float = 4.0
    targets: tuple[str, ...] = ()
    seed: int = 0
    density: float = 0.01
    entries: int = 0
    scores: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    moments: Mapping[str, Tensor] = field(default_factory=dict, compare=False)


class SlicedLinear(nn.Module):
    """A frozen linear layer plus a trained slice.

    Slice tensors carry a leading axis of length 1. It is the example axis: a tangent may be longer there,
    one direction per example (see ``export.autodiff.dual``). Frozen tensors on the meta device have no values until
    they are made from the layer's weight.

    Attributes:
        TRAINED: names of the slice's tensors, trained by devices or changed by the coordinator alone
            (:attr:`edge_runtime.slices.kind.SliceKind.held`); their shape says how large the slice is.
        FROZEN: names of the tensors that are made from the layer's weight.
    """

    TRAINED: ClassVar[tuple[str, ...]]
    FROZEN: ClassVar[tuple[str, ...]] = ()

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + what the slice adds; x has shape (B, T, in).

        Raises:
            ModelError: the model has joined examples and tokens to one axis before this layer.
        """
        raise NotImplementedError

    def frozen_of(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of :attr:`FROZEN` by name, made of the layer's weight (out, in)."""
        del weight
        return {}

    @staticmethod
    def options_of(shapes: Mapping[str, tuple[int, ...]]) -> SliceOptions:
        """Options that give slices of such tensors (shapes by name within the slice), with scale 1."""
        raise NotImplementedError

    @classmethod
    def pair(cls, name: str, values: Mapping[str, FloatArray], frozen: Frozen) -> Pair:
        """Trained values as a LoRA pair.

        Args:
            name: name of the slice.
            values: values of its trained tensors, by name within the slice.
            frozen: gives its frozen tensors.

        Raises:
            ModelError: values of this kind are no product of two small factors.
        """
        raise NotImplementedError

    @classmethod
    def change(
        cls, name: str, values: Mapping[str, FloatArray], frozen: Frozen, shape: tuple[int, int]
    ) -> Tensor:
        """What trained values add to the layer's weight: float32, of the weight's ``shape`` (out, in)."""
        del shape
        a, b, scale = cls.pair(name, values, frozen)
        return torch.from_numpy(np.float32(scale) * (b @ a))

    @classmethod
    def start(cls, where: str, target: str, pair: Pair, frozen: Frozen) -> dict[str, FloatArray]:
        """Values of the trained tensors, by name within the slice, that compute what a LoRA pair computes.

        Args:
            where: the adapter that the pair is from, for messages.
            target: module that the slice adapts.
            pair: pair to start from.
            frozen: gives the slice's frozen tensors.

        Raises:
            ModelError: no slice of this kind computes that.
        """
        raise NotImplementedError


def require_tokens(x: Tensor) -> None:
    """Refuse an input (B·T, in), of which a slice could have no direction for each example."""
    if x.dim() != 3:
        raise ModelError(
            "a target layer gets examples and tokens joined to one axis (OPT's fc1 and fc2 do), so that a slice of "
            "it could have no direction for each example; choose other --targets, the attention's projections say"
        )


def checked_rank(linear: nn.Linear, options: SliceOptions) -> int:
    """The rank that was asked for.

    Raises:
        ModelError: it exceeds a side of the layer.
    """
    if options.rank > min(linear.in_features, linear.out_features):
        raise ModelError(
            f"rank {options.rank} exceeds the sides {linear.out_features}x{linear.in_features} of the target layer; "
            "choose a smaller --rank"
        )
    return options.rank
