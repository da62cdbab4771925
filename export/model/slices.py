"""Slices put beside the linear layers that were asked for. What a slice computes is in :mod:`export.slices`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from edge_runtime.errors import ModelError
from export.model.attention import query_and_value_layers
from export.slices.kinds import KINDS
from export.slices.sliced_linear import SliceOptions

__all__ = ["ALL_LINEAR", "SliceOptions", "attach_slices", "slice_and_tensor"]

#: As in ``peft``: every linear layer, of the blocks.
ALL_LINEAR = "all-linear"


def slice_and_tensor(parameter: str) -> tuple[str, str]:
    """Names that a package gives to a trainable parameter of a loaded module: its slice and the tensor in it."""
    owner, _, tensor = parameter.removeprefix("encoder.").rpartition(".")
    return owner, tensor


def attach_slices(model: nn.Module, blocks: str, options: SliceOptions) -> tuple[str, ...]:
    """Replace every targeted linear layer inside the blocks by one with a slice, in order.

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
            setattr(model.get_submodule(parent), child, KINDS[options.kind](name, linear, options, generator))
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
