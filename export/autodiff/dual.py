"""Forward-mode differentiation of a captured graph: one rule per ATen operator, in one table.

A value is a pair (primal, tangent). With K directions at once, the tangent of a tensor of shape S has
shape (K, *S): a new leading axis, so every rule is the ordinary formula with one more batch axis. Where a
primal axis has length 1 the tangent's may be longer: that is how a slice shared by the batch carries one
direction per example (core (1, r, r), tangent (K, B, r, r)).

A tangent that is zero is the value ``ZERO``, never a tensor: frozen weights and everything computed
before the first trained slice add no operation to the dual program.

:class:`DualInterpreter` runs a graph on such pairs. Run under ``torch.export`` it records the dual
program; run on plain tensors it computes a jvp. An operator without a rule stops it
(:class:`MissingRuleError`): a silent wrong derivative would be worse.

The formulas are the textbook ones (Griewank & Walther, Evaluating Derivatives, 2008, ch. 3), in closed
form where that reuses primal results: softmax, normalisations, GELU, SiLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

import export.autodiff.dual_rules_closed  # noqa: F401  (registers its rules)
from export.autodiff.dual_rules import LISTED, RULES, ZERO, MissingRuleError, Tangent, Zero

__all__ = ["RULES", "ZERO", "DualInterpreter", "MissingRuleError", "Tangent", "Zero"]


class DualInterpreter(fx.Interpreter):
    """Run a graph on (primal, tangent) pairs.

    Args:
        module: a graph of ATen operators, as ``export.capture.record`` cuts it.
    """

    def run_dual(self, primals: Sequence[Tensor], tangents: Sequence[Tangent]) -> list[tuple[Any, Tangent]]:
        """Evaluate the graph.

        Args:
            primals: one tensor per placeholder, in order.
            tangents: for each a tensor of shape (K, *primal shape) or ZERO.

        Returns:
            For each output of the graph its value and tangent.

        Raises:
            MissingRuleError: an operator that meets a tangent has no rule.
        """
        pairs: dict[fx.Node, tuple[Any, Any]] = {}
        inputs = iter(zip(primals, tangents, strict=True))
        for node in self.graph.nodes:
            if node.op == "placeholder":
                pairs[node] = next(inputs)
            elif node.op == "call_function":
                pairs[node] = self._call(node, pairs)
            elif node.op == "output":
                return [pairs[value] for value in node.args[0]]
            else:
                raise MissingRuleError(
                    f"node {node.name} is a {node.op}; only ATen calls can be differentiated"
                )
        raise MissingRuleError("the graph has no output")

    def _call(self, node: fx.Node, pairs: dict[fx.Node, tuple[Any, Any]]) -> tuple[Any, Any]:
        args = fx.node.map_arg(node.args, lambda n: pairs[n][0])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: pairs[n][0])
        listed = node.target in LISTED

        def tangent(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return pairs[arg][1]
            return [tangent(each) for each in arg] if listed and isinstance(arg, list | tuple) else ZERO

        moving = [n for n in node.all_input_nodes if not isinstance(pairs[n][1], Zero)]
        if moving:
            read = [
                n for arg in node.args for n in (arg if listed and isinstance(arg, list | tuple) else [arg])
            ]
            if node.target not in RULES or any(n not in read for n in moving):
                raise MissingRuleError(
                    f"no tangent rule for operator {node.target} (node {node.name}{_module_of(node)}), and a "
                    "slice comes before it; name --targets that lie behind it in the last block (in BERT "
                    "layer.11.output.dense lies behind the activation), install a newer edge-export, or choose a model "
                    "of a family that the README lists"
                )
            dots = [tangent(arg) for arg in node.args]
            try:
                return RULES[node.target](args, dots, kwargs)
            except MissingRuleError as error:
                raise MissingRuleError(f"{error} (operator {node.target}, node {node.name})") from error
        return node.target(*args, **kwargs), ZERO  # type: ignore[operator]


def _module_of(node: fx.Node) -> str:
    """Which module of the model a node came from, in words; empty if the graph does not tell."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    return f" of module {path}, a {str(kind).rsplit('.', 1)[-1]}"
