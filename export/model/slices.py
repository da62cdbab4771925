"""Trainable slices beside frozen linear layers: which, and what they compute."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edge_runtime.errors import ModelError
from export.model.attention import query_and_value_layers

SliceKind = Literal["lora_xs", "lora"]
#: Names of a slice's trainable tensors, and of the tensors made from the frozen weight.
TRAINABLE = ("core", "A", "B")
FACTORS = ("up", "down")
#: Sides up to which the singular value decomposition is exact; beyond, its leading part is found by iteration.
EXACT_SIDE = 1024
#: Directions beyond the rank, and power iterations (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.4).
OVERSAMPLING, POWER_ITERATIONS = 12, 8


@dataclass(frozen=True)
class SliceOptions:
    """Which slices to attach.

    Attributes:
        kind: ``lora_xs`` (a trained r×r core between frozen SVD factors; Bałazy et al. 2024,
            arXiv 2405.17604, section 3) or ``lora`` (Hu et al. 2021, arXiv 2106.09685, section 4.1).
        rank: inner side r of a slice.
        alpha: numerator of the scale; the update is multiplied by alpha / rank.
        targets: modules to adapt, as in ``peft``'s ``target_modules``: a name or a dotted suffix of it, or
            ``all-linear`` alone. Empty means the layers that make queries and values (``export.model.attention``).
        seed: seed of LoRA's random A.
    """

    kind: SliceKind = "lora_xs"
    rank: int = 4
    alpha: float = 4.0
    targets: tuple[str, ...] = ()
    seed: int = 0


#: As in ``peft``: every linear layer, of the blocks.
ALL_LINEAR = "all-linear"


class SlicedLinear(nn.Module):
    """A frozen linear layer plus a trained slice.

    Slice tensors carry a leading axis of length 1. It is the example axis: a tangent may be longer there,
    one direction per example (see ``export.autodiff.dual``). The factors of LoRA-XS have no values until they are made
    from the layer's weight (:func:`factors`).
    """

    def __init__(self, linear: nn.Linear, options: SliceOptions, generator: torch.Generator) -> None:
        super().__init__()
        rank = options.rank
        if rank > min(linear.in_features, linear.out_features):
            raise ModelError(
                f"rank {rank} exceeds the sides {linear.out_features}x{linear.in_features} of the target layer; "
                "choose a smaller --rank"
            )
        self.linear = linear
        self.scale_value = options.alpha / rank
        if options.kind == "lora_xs":
            self.register_buffer("up", torch.empty(linear.out_features, rank, device="meta"))
            self.register_buffer("down", torch.empty(rank, linear.in_features, device="meta"))
            self.core = nn.Parameter(torch.zeros(1, rank, rank))
        else:
            bound = linear.in_features**-0.5
            a = torch.rand(1, rank, linear.in_features, generator=generator) * 2 * bound - bound
            self.register_buffer("scale", torch.tensor(self.scale_value))
            self.A = nn.Parameter(a)
            self.B = nn.Parameter(torch.zeros(1, linear.out_features, rank))
        self.kind = options.kind

    # Buffers and parameters are declared for the type checker; which exist depends on the kind.
    up: Tensor
    down: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + up·core·down·x, or + scale·B·A·x; x has shape (B, T, in).

        Raises:
            ModelError: the model has joined examples and tokens to one axis before this layer.
        """
        if x.dim() != 3:
            raise ModelError(
                "a target layer gets examples and tokens joined to one axis (OPT's fc1 and fc2 do), so that a slice of "
                "it could have no direction for each example; choose other --targets, the attention's projections say"
            )
        if self.kind == "lora_xs":
            inner = torch.matmul(nn.functional.linear(x, self.down), self.core.transpose(-1, -2))
            return torch.add(self.linear(x), nn.functional.linear(inner, self.up))
        inner = torch.matmul(x, self.A.transpose(-1, -2))
        return torch.add(self.linear(x), torch.matmul(inner, self.B.transpose(-1, -2)) * self.scale)


def factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """LoRA-XS's frozen factors of a weight (out, in): up = U·S·scale (out, r) and down = Vᵀ (r, in), float32.

    The leading ``rank`` singular triplets: exact for small matrices, by seeded subspace iteration for large ones.
    """
    if min(weight.shape) <= EXACT_SIDE:
        left, singular, right = torch.linalg.svd(weight.double(), full_matrices=False)
    else:
        left, singular, right = _leading_triplets(weight.float(), rank)
    up = (left[:, :rank] * singular[:rank] * scale).float().contiguous()
    return up, right[:rank].float().contiguous()


def _leading_triplets(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(weight.shape[1], rank + OVERSAMPLING, generator=generator)
    for _ in range(POWER_ITERATIONS):
        basis, _ = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis)[0])
    left, singular, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    return left, singular, right @ basis.T


def slice_and_tensor(parameter: str) -> tuple[str, str]:
    """Names that a package gives to a trainable parameter of a loaded module: its slice and the tensor in it."""
    owner, _, tensor = parameter.removeprefix("encoder.").rpartition(".")
    return owner, tensor


def attach_slices(model: nn.Module, blocks: str, options: SliceOptions) -> tuple[str, ...]:
    """Replace every targeted linear layer inside the blocks by a :class:`SlicedLinear`, in order.

    Args:
        model: model to change in place.
        blocks: dotted path of its list of blocks.
        options: slices to attach.

    Returns:
        Dotted paths of the replaced layers.

    Raises:
        ModelError: a target matches no linear layer inside the blocks.
    """
    generator = torch.Generator().manual_seed(options.seed)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{blocks}.")
    ]
    chosen = (
        _targeted(linears, options.targets, blocks)
        if options.targets
        else _by_structure(model, linears, blocks)
    )
    for name in chosen:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            setattr(model.get_submodule(parent), child, SlicedLinear(linear, options, generator))
    return chosen


def _targeted(linears: Sequence[str], targets: tuple[str, ...], blocks: str) -> tuple[str, ...]:
    """The layers that the operator named."""
    if targets == (ALL_LINEAR,) and linears:
        return tuple(linears)
    if ALL_LINEAR in targets:
        raise ModelError(f"{ALL_LINEAR!r} stands alone: give --targets {ALL_LINEAR}, or names without it")
    for target in targets:
        if not any(_matches(name, target) for name in linears):
            raise ModelError(
                f"target module {target!r} matches no linear layer of the blocks; they have {_kinds(linears, blocks)}"
            )
    return tuple(name for name in linears if any(_matches(name, target) for target in targets))


def _by_structure(model: nn.Module, linears: Sequence[str], blocks: str) -> tuple[str, ...]:
    """The layers that make queries and values."""
    try:
        chosen = query_and_value_layers(model, blocks, linears)
    except Exception as error:  # the model's own code runs here, and may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the layers of queries and values cannot be found, because the model does not run without values: "
            f"{reason}; name --targets, of {_kinds(linears, blocks)}"
        ) from error
    if not chosen:
        raise ModelError(
            f"the blocks have no attention with linear layers for queries and values; name --targets, of "
            f"{_kinds(linears, blocks)}"
        )
    return chosen


def _kinds(linears: Iterable[str], blocks: str) -> str:
    return ", ".join(
        sorted({re.sub(rf"^{re.escape(blocks)}\.\d+\.", "", name) for name in linears}) or ["none"]
    )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
