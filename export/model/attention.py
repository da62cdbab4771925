"""Which linear layers make an attention's queries and values, told from what their results are used for.

The model is run once on tensors that have shapes but no values, and every result remembers the linear layers that it
was computed from. A product that goes through a softmax compares queries (its first factor) with keys; what the
softmax's result is multiplied with are values. No name matters: a layer that makes queries, keys and values at once
is both, and so is found once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
PRODUCTS = (aten.bmm.default, aten.baddbmm.default)
SOFTMAXES = (aten._softmax.default, aten._safe_softmax.default)
#: Part of the names of operators that attend at once, from queries, keys and values.
FUSED = "scaled_dot_product"
#: What an attention module's class or attribute is called by, where no softmax tells.
ATTENTION_NAMES = ("attn", "attention")


@dataclass(frozen=True)
class _Mark:
    """What is known of a tensor.

    Attributes:
        layers: linear layers that it was computed from, the nearest ones only.
        queries: layers of a product's first factor; what is made from the product has them too.
        is_share: whether a softmax gave it.
    """

    layers: frozenset[str] = frozenset()
    queries: frozenset[str] = frozenset()
    is_share: bool = False


@dataclass
class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows marks through every operator."""

    marks: dict[int, _Mark] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)
    #: Keeps every marked tensor alive, so that no other takes its identity.
    kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def mark(self, value: object, mark: _Mark) -> None:
        """Remember something about a tensor."""
        if isinstance(value, Tensor):
            self.marks[id(value)] = mark
            self.kept.append(value)

    def mark_of(self, value: object) -> _Mark:
        """What is known of a tensor."""
        return self.marks.get(id(value), _Mark())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if FUSED in function.name():
            self._attend(*map(self.mark_of, args[:3]))
            mark = _Mark()
        elif function in PRODUCTS:
            mark = self._product(*map(self.mark_of, args[-2:]))
        else:
            known = [m for m in map(self.mark_of, tree_leaves((args, kwargs))) if m != _Mark()]
            # DeBERTa adds products of positions to that of queries and keys: the first one counts.
            queries = next((mark.queries for mark in known if mark.queries), frozenset[str]())
            mark = _Mark(
                frozenset[str]().union(*(mark.layers for mark in known)),
                queries,
                any(mark.is_share for mark in known) or (function in SOFTMAXES and bool(queries)),
            )
        if mark != _Mark():
            for leaf in tree_leaves(result):
                self.mark(leaf, mark)
        return result

    def _attend(self, query: _Mark, _: _Mark, value: _Mark) -> None:
        self.found |= query.layers | value.layers

    def _product(self, first: _Mark, second: _Mark) -> _Mark:
        if not first.is_share:
            return _Mark(first.layers | second.layers, first.layers)
        if second.layers:
            self.found |= first.queries | second.layers
        return _Mark()


def query_and_value_layers(model: nn.Module, blocks: str, linears: Sequence[str]) -> tuple[str, ...]:
    """The linear layers that make queries and values.

    Where there is no such product, as in linear attention, they are the layers inside attention modules that take the
    module's own input.

    Args:
        model: a model of token ids; its parameters need no values.
        blocks: dotted path of its list of blocks.
        linears: dotted paths of the layers to choose from.

    Returns:
        Those of ``linears`` that were found, in their order.
    """
    observer, mode = _Observer(), FakeTensorMode(allow_non_fake_inputs=True)
    inputs: set[str] = set()
    with ExitStack() as stack, torch.no_grad(), mode:
        held = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.is_meta
        }
        ids = torch.ones(2, 7, dtype=torch.long)
        chosen = set(linears)
        taken: list[tuple[str, set[int]]] = []
        for name, module in model.named_modules():
            if name in chosen:
                hook = partial(_leave_linear, observer, taken, inputs, name)
                stack.callback(module.register_forward_hook(hook).remove)
            elif _is_attention(name, module):
                enter = partial(_enter_attention, taken, name)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for block in model.get_submodule(blocks).children():
            stack.callback(block.register_forward_pre_hook(partial(_enter_block, observer)).remove)
        stack.enter_context(observer)
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_without_cache(model)}
        torch.func.functional_call(model, held, (), arguments)
    found = observer.found or inputs
    return tuple(name for name in linears if name in found)


def _without_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _enter_block(observer: _Observer, _: nn.Module, args: Any) -> None:
    """What an earlier block computed is no query or value of this one."""
    for leaf in tree_leaves(args):
        observer.marks.pop(id(leaf), None)


def _is_attention(name: str, module: nn.Module) -> bool:
    called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return any(part in called for part in ATTENTION_NAMES)


def _enter_attention(
    taken: list[tuple[str, set[int]]], name: str, _: nn.Module, args: Any, kwargs: Any
) -> None:
    taken.append((f"{name}.", {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}))


def _leave_linear(
    observer: _Observer,
    taken: list[tuple[str, set[int]]],
    inputs: set[str],
    name: str,
    _: nn.Module,
    args: Any,
    result: Any,
) -> None:
    observer.mark(result, _Mark(frozenset([name])))
    if any(name.startswith(owner) and id(args[0]) in tensors for owner, tensors in taken):
        inputs.add(name)
