"""Lower a recorded program to ExecuTorch's ``.pte``: XNNPACK where it takes an operator, else ExecuTorch's own kernels.

Weights are inputs, as in the ONNX programs of ``float`` arithmetic: one program serves all blocks of equal structure,
and a device's prepared files serve both engines. ExecuTorch plans memory ahead, for the largest sizes a program
may meet; these *bounds* are part of what is lowered. Why so: docs/decisions/0013-executorch.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edge_runtime.engines.names import INPUTS_METHOD, NAME_SEPARATOR, OUTPUTS_METHOD
from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import Axis
from export.lowering.executorch_library import (
    ALL_PARTITIONER_CONFIGS,
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    MemoryPlanningPass,
    XnnpackPartitioner,
    to_edge_transform_and_lower,
)
from export.lowering.executorch_passes import equal_ranks, feed_float_weights
from export.lowering.quiet import quiet
from export.lowering.trace import BATCH, DRAWS, SEQUENCE, TracedProgram

#: Sizes at which a program is recorded again, where its bounds allow them; a side of one would be taken as fixed.
_EXAMPLE_SIZES = {DRAWS: 2, BATCH: 3, SEQUENCE: 5}
_KEPT_OUT = ("unsqueeze_copy", "_clone_dim_order", "_to_dim_order_copy")
#: Why XNNPACK's partitioner refuses what it would take in other forms.
_CONSTANT = "XNNPACK takes constant weights only, and this weight is an input"
_REFUSED = {
    "mm": _CONSTANT,
    "addmm": _CONSTANT,
    "linear": _CONSTANT,
    "view_copy": "XNNPACK takes no views with dynamic sides",
    "mean": "XNNPACK takes means over the sides of images only",
}


@dataclass(frozen=True)
class LoweredProgram:
    """A lowered program.

    Attributes:
        buffer: bytes of the ``.pte`` file.
        inputs: names of the inputs, in the order the method takes them.
        outputs: names of the outputs, in the order the method gives them.
        planned_bytes: memory that ExecuTorch planned ahead, all arenas together.
        undelegated: operators that XNNPACK did not take, each with its name, how many there are, and the reason.
    """

    buffer: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    planned_bytes: int
    undelegated: tuple[tuple[str, int, str], ...]


def lower_executorch(program: TracedProgram, bounds: Mapping[Axis, int]) -> LoweredProgram:
    """Translate a program.

    Args:
        program: what ``export.lowering.trace.trace`` recorded; left as it is.
        bounds: largest draws, batch and sequence that the lowered program takes.

    Returns:
        The program, which takes every frozen matrix X as float32 ``X_float`` (K, N).

    Raises:
        ModelError: ExecuTorch cannot lower the program.
    """
    with quiet():
        recorded, names = _record_again(program, bounds)
        return _lower(recorded, names, program.outputs)


def _record_again(
    program: TracedProgram, bounds: Mapping[Axis, int]
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The program on float weights, recorded within its bounds, and the names of its inputs in order."""
    module = program.exported.module(check_guards=False)
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, program.inputs, strict=True):
        node.name = name
    feed_float_weights(graph)
    equal_ranks(graph)
    graph.eliminate_dead_code()
    graph.set_codegen(fx.graph.CodeGen())  # plain arguments in the order of the placeholders
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    names = tuple(node.name for node in inputs)
    sizes: dict[str, int] = {axis: min(_EXAMPLE_SIZES[axis], size) for axis, size in bounds.items()}
    examples = tuple(_example(node, program.axes.get(node.name, {}), sizes) for node in inputs)
    dims: dict[str, Any] = {
        axis: torch.export.Dim(axis, min=2 if axis == SEQUENCE else 1, max=size)
        for axis, size in bounds.items()
        if size > 1
    }
    shapes = tuple({a: dims.get(s) for a, s in program.axes.get(name, {}).items()} for name in names)
    with torch.no_grad():
        recorded = torch.export.export(fx.GraphModule(module, graph), examples, dynamic_shapes=shapes)
    return recorded, names


def _example(node: fx.Node, axes: Mapping[int, str], sizes: Mapping[str, int]) -> Tensor:
    value = node.meta["val"]
    shape = [sizes[axes[a]] if a in axes else int(side) for a, side in enumerate(value.shape)]
    return torch.zeros(shape, dtype=value.dtype)


def _lower(
    recorded: torch.export.ExportedProgram, names: tuple[str, ...], outputs: tuple[str, ...]
) -> LoweredProgram:
    try:
        edge = to_edge_transform_and_lower(
            recorded,
            partitioner=[_partitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={
                INPUTS_METHOD: NAME_SEPARATOR.join(names),
                OUTPUTS_METHOD: NAME_SEPARATOR.join(outputs),
            },
        )
        undelegated = _undelegated(edge.exported_program().graph)
        # Inputs are weights and values that exist already: the program reads them where they lie.
        planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=True)
        lowered = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    except Exception as error:  # the library's errors have no narrower root
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"ExecuTorch cannot lower the program: {reason}") from error
    plans = lowered.executorch_program.execution_plan
    planned = sum(int(size) for plan in plans for size in plan.non_const_buffer_sizes)
    return LoweredProgram(bytes(lowered.buffer), names, outputs, planned, undelegated)


def _undelegated(graph: fx.Graph) -> tuple[tuple[str, int, str], ...]:
    """Operators outside any delegate, most frequent first, each with the reason."""
    known = _xnnpack_operators()
    counts: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        operator = getattr(node.target, "_op", None)
        if not isinstance(operator, torch._ops.OpOverload):  # delegates, their results, arithmetic on sizes
            continue
        name = str(operator).removesuffix(".default")
        counts[name, _reason(node, name, known)] += 1
    return tuple((name, count, reason) for (name, reason), count in counts.most_common())


def _reason(node: fx.Node, name: str, known: frozenset[str]) -> str:
    base = name.partition(".")[2].partition(".")[0]
    if base in _KEPT_OUT:
        return (
            "kept out: XNNPACK refuses a copy that changes nothing, and a side added among two dynamic ones"
        )
    if base not in known:
        return "XNNPACK has no such operator"
    if base in _REFUSED:
        return _REFUSED[base]
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.dtype != torch.float32:
        return f"XNNPACK computes in float32, this is {str(value.dtype).removeprefix('torch.')}"
    return "the partitioner's check of shapes or arguments refused it"


def _partitioner() -> Any:
    """XNNPACK for everything it takes, except copies and added sides.

    A copy that changes nothing would be an output passed through, and an added side may be a reshape with two dynamic
    sides. Its partitioner takes both, and its compiler then refuses the whole program.
    """
    left = {f"{name}Config" for name in ("Clone", "CloneDimOrder", "ToDimOrderCopy", "UnsqueezeCopy")}
    return XnnpackPartitioner(configs=[c for c in ALL_PARTITIONER_CONFIGS if c.__name__ not in left])


def _xnnpack_operators() -> frozenset[str]:
    return frozenset(str(config.target_name).partition(".")[0] for config in ALL_PARTITIONER_CONFIGS)
