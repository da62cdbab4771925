"""Reverse-mode differentiation of a captured graph: its vector-Jacobian product, one rule per ATen operator.

:class:`AdjointInterpreter` runs a graph forwards, keeping what the rules need, then back from the cotangents of its
outputs to those of the wanted inputs. Run under ``torch.export`` it records one program that recomputes the segment
and differentiates it: the step of checkpointed backpropagation between two kept inputs (Chen et al. 2016,
arXiv 1604.06174, section 3). Only what leads from a wanted input to a given output has a cotangent; frozen weights add
nothing. A cotangent is summed over the batch where its input is shared by the batch, so a slice's gradient has the
slice's own shape.

An operator on that way without a rule stops it (:class:`MissingRuleError`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from export.autodiff.adjoint_rules import ADJOINT_RULES, CONSTANT, ELEMENTWISE, Pullback
from export.autodiff.dual_rules import LISTED, MissingRuleError


class AdjointInterpreter(fx.Interpreter):
    """Run a graph forwards and back.

    Args:
        module: a graph of ATen operators, as ``export.capture.record`` cuts it.
    """

    def run_adjoint(
        self, primals: Sequence[Tensor], wanted: Sequence[bool], seeds: Mapping[int, Tensor | None]
    ) -> tuple[list[Any], list[Tensor]]:
        """Evaluate the graph and its vector-Jacobian product.

        Args:
            primals: one tensor per placeholder, in order.
            wanted: for each placeholder, whether its cotangent is asked for.
            seeds: cotangents of outputs, by position; None stands for ones. Outputs that are not named count as zeros.

        Returns:
            The outputs, and the cotangents of the wanted placeholders, each of its primal's shape.

        Raises:
            MissingRuleError: an operator on the way has no rule, or a wanted input has no influence.
        """
        self.values: dict[fx.Node, Any] = {}
        self.pullbacks: dict[fx.Node, Pullback] = {}
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.values.update(zip(placeholders, primals, strict=True))
        asked = [node for node, want in zip(placeholders, wanted, strict=True) if want]
        active = self._forwards(set(asked))
        results = next(node for node in self.graph.nodes if node.op == "output").args[0]
        outputs = [self.values[node] for node in results]
        bars: dict[fx.Node, Tensor] = {}
        for position, seed in seeds.items():
            bar = torch.ones_like(outputs[position]) if seed is None else seed
            _accumulate(bars, results[position], bar)
        self._back(bars, active)
        for node in asked:
            if node not in bars:
                raise MissingRuleError(f"the result does not depend on {node.name}")
        return outputs, [_expanded(bars[node], self.values[node]) for node in asked]

    def _forwards(self, active: set[fx.Node]) -> set[fx.Node]:
        """Compute all values; returns the nodes that a wanted input influences."""
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op != "call_function":
                raise MissingRuleError(
                    f"node {node.name} is a {node.op}; only ATen calls can be differentiated"
                )
            args = fx.node.map_arg(node.args, self.values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, self.values.__getitem__)
            moving = [n for n in node.all_input_nodes if n in active]
            if not moving or node.target in CONSTANT:
                self.values[node] = node.target(*args, **kwargs)
                continue
            if node.target not in ADJOINT_RULES or any(n not in _read(node) for n in moving):
                raise MissingRuleError(
                    f"no adjoint rule for operator {node.target} (node {node.name}); add one to "
                    "export/autodiff/adjoint_rules.py, or export without --with-adjoint"
                )
            with _named(node):
                self.values[node], self.pullbacks[node] = ADJOINT_RULES[node.target](args, kwargs)
            active.add(node)
        return active

    def _back(self, bars: dict[fx.Node, Tensor], active: set[fx.Node]) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node not in self.pullbacks or node not in bars:
                continue
            value = self.values[node]
            bar = bars.pop(node)
            if node.target not in ELEMENTWISE:
                bar = _expanded(bar, value)
            for position, source in enumerate(_read(node)):
                if source not in active:
                    continue
                with _named(node):
                    pulled, reached = self.pullbacks[node](bar, position), self.values[source]
                if node.target in ELEMENTWISE and (value.dim() > reached.dim() or _stretched(value, reached)):
                    pulled = _expanded(pulled, value)
                _accumulate(bars, source, _summed(pulled, reached))


@contextmanager
def _named(node: fx.Node) -> Iterator[None]:
    """Add operator and node to the message of what a rule refuses."""
    try:
        yield
    except MissingRuleError as error:
        raise MissingRuleError(f"{error} (operator {node.target}, node {node.name})") from error


def _read(node: fx.Node) -> list[Any]:
    """Arguments that a rule may differentiate by, in order; of an operator that takes a list, the list's entries."""
    first = node.args[0] if node.args else None
    if node.target in LISTED and isinstance(first, list | tuple):
        return list(first)
    return list(node.args)


def _accumulate(bars: dict[fx.Node, Tensor], node: fx.Node, bar: Tensor) -> None:
    bars[node] = bars[node] + bar if node in bars else bar


def _same(a: Any, b: Any) -> bool:
    """Whether two sides are equal, without fixing a dynamic one to a number."""
    if isinstance(a, int) != isinstance(b, int):
        return False
    return bool(a == b)


def _expanded(bar: Tensor, like: Tensor) -> Tensor:
    """A cotangent in the full shape of its value."""
    if bar.dim() == like.dim() and all(map(_same, bar.shape, like.shape)):
        return bar
    return bar.expand(like.shape)


def _summed(bar: Tensor, source: Tensor) -> Tensor:
    """A cotangent summed over the axes along which its source was broadcast."""
    new = bar.dim() - source.dim()
    axes = [*range(new), *(axis + new for axis in _stretched(bar, source))]
    if not axes:
        return bar
    bar = bar.sum(axes, keepdim=True)
    for _ in range(new):
        bar = bar.squeeze(0)
    return bar


def _stretched(result: Tensor, source: Tensor) -> list[int]:
    """Axes of the source that are 1 where the result's are not; the last axes correspond."""
    new = result.dim() - source.dim()
    return [
        axis
        for axis in range(source.dim())
        if _same(source.shape[axis], 1) and not _same(result.shape[axis + new], 1)
    ]
