"""Top-k activations: of what a feed-forward part's activation function gives, a token's k largest entries alone go on.

A transformer trained so is Top-k of "The Lazy Neuron Phenomenon" (Li et al. 2022, arXiv 2210.06313, section 4: the k
largest entries of the activation map of each token are kept, the others are set to zero). Activation functions of
feed-forward parts rise where they are positive and vanish at minus infinity, so the entries whose *inputs* are largest
are taken: then the function is computed for k entries, and so is its tangent, which is carried for these alone. In a
gated part (SwiGLU) they are the largest entries of the gate.

Three operators, each one node of a program: :data:`largest`, :data:`pick` and :data:`place`. ``index`` may lack leading
axes, over which it is then the same: a tangent (K, B, T, F) takes the index (B, T, k) of its value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.errors import ModelError

#: Part of the names of modules that attend; an activation function inside one belongs to no feed-forward part.
ATTENTION_NAMES = ("attn", "attention")
#: An activation function is taken for one that vanishes below if it gives less than this at -PROBE.
PROBE, VANISHED = 20.0, 1e-3


@torch.library.custom_op("edge::largest", mutates_args=())
def _largest(x: Tensor, count: int) -> Tensor:
    return x.topk(count, dim=-1, sorted=False).indices.to(torch.int32)


@_largest.register_fake
def _(x: Tensor, count: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], count), dtype=torch.int32)


@torch.library.custom_op("edge::pick", mutates_args=())
def _pick(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-1, _aligned(index, x))


@_pick.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], index.shape[-1]))


@torch.library.custom_op("edge::place", mutates_args=())
def _place(kept: Tensor, index: Tensor, width: int) -> Tensor:
    return kept.new_zeros((*kept.shape[:-1], width)).scatter(-1, _aligned(index, kept), kept)


@_place.register_fake
def _(kept: Tensor, index: Tensor, width: int) -> Tensor:
    return kept.new_empty((*kept.shape[:-1], width))


def _aligned(index: Tensor, x: Tensor) -> Tensor:
    return index.long().expand(*x.shape[:-1], index.shape[-1])


#: (..., F), k → int32 (..., k): the places of the k largest entries of the last axis, in any order.
largest = torch.ops.edge.largest.default
#: (..., F), (..., k) → (..., k): the entries at these places.
pick = torch.ops.edge.pick.default
#: (..., k), (..., k), F → (..., F): entries at their places, and zero elsewhere.
place = torch.ops.edge.place.default

# torch's own backpropagation, for comparisons with it, takes the same pullbacks as the adjoint rules.
_pick.register_autograd(
    lambda ctx, bar: (place(bar, ctx.index, ctx.width), None),
    setup_context=lambda ctx, inputs, output: _keep(ctx, inputs[1], inputs[0].shape[-1]),
)
_place.register_autograd(
    lambda ctx, bar: (pick(bar, ctx.index), None, None),
    setup_context=lambda ctx, inputs, output: _keep(ctx, inputs[1], inputs[2]),
)


def _keep(ctx: Any, index: Tensor, width: int) -> None:
    ctx.index, ctx.width = index, width


class TopActivations(nn.Module):
    """An activation function of which the k largest of F entries of each token are kept.

    Args:
        activation: function of one element.
        kept: number k of entries that are kept.
        width: number F of entries.
    """

    def __init__(self, activation: nn.Module, kept: int, width: int) -> None:
        super().__init__()
        self.activation, self.kept, self.width = activation, kept, width

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) → (..., F), of which at most k entries are not zero.

        Raises:
            ModelError: the last axis is not that of the feed-forward part.
        """
        if x.shape[-1] != self.width:
            raise ModelError(
                f"--mlp-topk: an activation function of the blocks takes {x.shape[-1]} entries, and config.json gives "
                f"feed-forward parts {self.width}; leave --mlp-topk out for this model"
            )
        index = largest(x, self.kept)
        result: Tensor = place(self.activation(pick(x, index)), index, self.width)
        return result


def keep_top_activations(model: nn.Module, blocks: str, kept: int, width: int | None) -> int:
    """Let each block's feed-forward part keep its largest activations.

    Args:
        model: model to change in place.
        blocks: dotted path of its list of blocks.
        kept: number k of activations that are kept.
        width: number F of activations of a feed-forward part, as the configuration has it; None if it has none.

    Returns:
        The number of parts.

    Raises:
        ModelError: the parts cannot be told, or their activation function is none that vanishes below.
    """
    if width is None:
        raise ModelError(
            "--mlp-topk: config.json names no width of the feed-forward parts; leave --mlp-topk out for this model"
        )
    if kept > width:
        raise ModelError(f"--mlp-topk is {kept}, and feed-forward parts have {width} activations; take fewer")
    count = 0
    for block in model.get_submodule(blocks).children():
        found = [
            name
            for name, module in block.named_modules()
            if _is_activation(module) and not any(part in name.lower() for part in ATTENTION_NAMES)
        ]
        if len(found) != 1:
            raise ModelError(
                f"--mlp-topk needs blocks with one activation function outside attention, a module of its own; this "
                f"model's have {len(found)}; leave --mlp-topk out for this model"
            )
        parent, _, child = found[0].rpartition(".")
        activation = block.get_submodule(found[0])
        if not _vanishes_below(activation):
            raise ModelError(
                "--mlp-topk is for activation functions that vanish below, such as ReLU, GELU and SiLU, and this model "
                f"has {type(activation).__name__}; leave --mlp-topk out for this model"
            )
        setattr(block.get_submodule(parent), child, TopActivations(activation, kept, width))
        count += 1
    return count


def _is_activation(module: nn.Module) -> bool:
    """Whether a module computes a function of one element: it has no tensors and no parts, and keeps sizes."""
    home = type(module).__module__
    named = home in ("transformers.activations", "torch.nn.modules.activation")
    return named and not any(True for _ in module.children()) and not list(module.parameters())


def _vanishes_below(activation: nn.Module) -> bool:
    """Whether the function is about zero far below and rises above."""
    with torch.no_grad():
        below, above = activation(torch.tensor([-PROBE, PROBE])).tolist()
    return bool(abs(below) < VANISHED and above > 1)
