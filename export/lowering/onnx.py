"""Lower a recorded program to ONNX: weights stay outside, shapes stay dynamic, quantised stays quantised.

``torch.onnx`` does the translation, by the steps of its ``export`` that a program needs; this module adds what the
project needs: the quantised operators map to single nodes, and reshapes name their dynamic axes by position instead of
computing them (a program of one block otherwise carries a hundred Shape and Gather nodes). Frozen tensors stay
inputs; ``export.lowering.arithmetic`` decides which of them are bound when the program is loaded.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import opset20 as op
from torch import Tensor, fx
from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]
from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _ir_passes, _registration
from torch.onnx._internal.fx.passes import type_promotion

from edge_runtime.engines.names import OUTPUT_SUFFIX
from export.lowering.trace import BEFORE, SEEN, TracedProgram
from export.model.top_activations import largest, pick, place
from export.quantisation.quantise import BLOCK, frozen_embedding, frozen_linear, frozen_linear_transposed

aten = torch.ops.aten
OPSET = 20
# torch.onnx asks its five hundred translations for their signatures anew for each program, and onnxscript parses their
# source for every answer: a third of a second a program, for what cannot change. Once a process is enough.
_translation = onnxscript.values.TracedOnnxFunction
_translation.function_ir = property(functools.cache(_translation.function_ir.fget))
#: Name of the product with a frozen matrix transposed: (..., N) to (..., K).
TRANSPOSED = "FrozenLinearTransposed"


def _engine_operator(name: str, inputs: dict[str, str], attributes: tuple[str, ...]) -> onnxscript.values.Op:
    """An operator of ONNX Runtime's own domain, for which ``onnx`` carries no schema.

    Args:
        name: name of the operator.
        inputs: element type of each input, by name; ``?`` at the end marks an optional input.
        attributes: names of its integer attributes.
    """
    schema = onnx.defs.OpSchema
    parameters = [
        schema.FormalParameter(
            key,
            kind.rstrip("?"),
            param_option=schema.FormalParameterOption.Optional
            if kind.endswith("?")
            else schema.FormalParameterOption.Single,
        )
        for key, kind in inputs.items()
    ]
    signature = schema(
        name,
        "com.microsoft",
        1,
        inputs=parameters,
        outputs=[schema.FormalParameter("Y", "tensor(float)")],
        attributes=[schema.Attribute(key, schema.AttrType.INT) for key in attributes],
    )
    return onnxscript.values.Op(onnxscript.values.Opset("com.microsoft", 1), name, signature)


_MATMUL_NBITS = _engine_operator(
    "MatMulNBits",
    {
        "A": "tensor(float)",
        "B": "tensor(uint8)",
        "scales": "tensor(float)",
        "zero_points": "tensor(uint8)?",
        "g_idx": "tensor(int32)?",
        "bias": "tensor(float)?",
    },
    ("K", "N", "bits", "block_size", "accuracy_level"),
)
#: Not the engine's: stands for a product with the transposed weight until ``export.lowering.arithmetic`` replaces it.
_FROZEN_TRANSPOSED = _engine_operator(
    TRANSPOSED,
    {
        "Y": "tensor(float)",
        "B": "tensor(uint8)",
        "scales": "tensor(float)",
        "zero_points": "tensor(uint8)?",
    },
    ("K", "N"),
)
_GATHER_BLOCK_QUANTIZED = _engine_operator(
    "GatherBlockQuantized",
    {"data": "tensor(uint8)", "indices": "tensor(int64)", "scales": "tensor(float)"},
    ("bits", "block_size", "gather_axis", "quantize_axis"),
)


@torch.library.custom_op("edge::reshape_by_position", mutates_args=())
def _reshape_by_position(x: Tensor, shape: list[int]) -> Tensor:
    sizes = [x.shape[axis] if side == 0 else side for axis, side in enumerate(shape)]
    return x.reshape(sizes).clone()


@_reshape_by_position.register_fake
def _(x: Tensor, shape: list[int]) -> Tensor:
    return torch.empty_like(x).reshape(
        [x.shape[axis] if side == 0 else side for axis, side in enumerate(shape)]
    )


def lower(program: TracedProgram) -> ir.Model:
    """Translate a program.

    Args:
        program: what ``export.lowering.trace.trace`` recorded; left as it is.

    Returns:
        An ONNX model whose inputs and outputs carry the program's names; frozen tensors are inputs too.
    """
    rewritten = _with_own_graph(program.exported)
    _name_reshapes_by_position(rewritten.graph)
    _drop_copies(rewritten.graph)
    rewritten.graph_module.recompile()
    # The translator warns about libraries that are not installed and not needed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _translate(_prepared(rewritten))
    _ir_passes.rename_inputs(model, program.inputs)
    _ir_passes.rename_outputs(model, [name + OUTPUT_SUFFIX for name in program.outputs])
    _name_axes(model, program)
    _shed_debug_data(model)
    return model


@functools.cache
def _translations() -> _registration.ONNXRegistry:
    """How each operator is translated: by torch.onnx, but for those of this project."""
    registry = _registration.ONNXRegistry.from_torchlib(OPSET)
    own: dict[Any, Callable[..., Any]] = {
        frozen_linear: _to_matmul_nbits,
        frozen_linear_transposed: _to_frozen_transposed,
        frozen_embedding: _to_gather_block_quantized,
        torch.ops.edge.reshape_by_position.default: _to_reshape,
        aten.gelu.default: _to_gelu,
        aten.squeeze.dims: _to_squeeze,
        largest: _to_largest,
        pick: _to_pick,
        place: _to_place,
    }
    for operator, translation in own.items():
        registry.register_op(operator, translation)
    return registry


@functools.cache
def _translated() -> frozenset[Any]:
    """Operators that have a translation; torch knows how to take the others apart."""
    return frozenset(_decomp.get_onnx_implemented_overloads(_translations()))


def _is_taken_apart(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target not in _translated()


def _prepared(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program as the translator takes it.

    ``torch.onnx.export`` records every program anew to take operators apart, and once more to make casts explicit:
    nine tenths of its time. Hardly a program has such an operator, and a block computes in float alone, so both are
    done where a node asks for it.
    """
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        _fx_passes.remove_assertion_nodes(program.graph_module)
        if any(_is_taken_apart(node) for node in program.graph.nodes):
            program = _fx_passes.decompose_with_registry(program, _translations())
        if any(_may_cast(node) for node in program.graph.nodes):
            _fx_passes.insert_type_promotion_nodes(program.graph_module)
    _fx_passes.remove_assertion_nodes(program.graph_module)
    return program


@functools.cache
def _promotions() -> type_promotion.TypePromotionTable:
    return type_promotion.TypePromotionTable()


def _may_cast(node: fx.Node) -> bool:
    """Whether an operator that casts what it is given is given, or gives, more than one type."""
    if node.op != "call_function" or type_promotion.get_type_promotion_rule(node, _promotions()) is None:
        return False
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    return len({getattr(value, "dtype", type(value)) for value in values}) > 1


def _translate(program: torch.export.ExportedProgram) -> ir.Model:
    model = _core._exported_program_to_onnx_program(program, registry=_translations()).model
    translated: ir.Model = onnxscript_apis.optimize(onnxscript_apis.convert_version(model, OPSET))
    return translated


def _with_own_graph(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program with a copy of its graph. Tensors are shared, so that no weight is copied."""
    return torch.export.ExportedProgram(
        exported.graph_module,
        copy.deepcopy(exported.graph),
        exported.graph_signature,
        exported.state_dict,
        exported.range_constraints,
        exported.module_call_graph,
        exported.example_inputs,
        exported.constants,
        verifiers=exported.verifiers,
    )


def _to_matmul_nbits(
    x: Any, levels: Any, scales: Any, zero_points: Any, bias: Any, accuracy_level: int
) -> Any:
    rows, blocks, block_bytes = map(int, levels.shape)
    bits = 8 if zero_points is None else 4
    block_size = block_bytes * 8 // bits
    return _MATMUL_NBITS(
        x,
        levels,
        scales,
        zero_points,
        None,
        bias,
        K=blocks * block_size,
        N=rows,
        bits=bits,
        block_size=block_size,
        accuracy_level=accuracy_level,
    )


def _to_frozen_transposed(gradient: Any, levels: Any, scales: Any, zero_points: Any) -> Any:
    rows, blocks, block_bytes = map(int, levels.shape)
    inputs = blocks * block_bytes * (1 if zero_points is None else 2)
    return _FROZEN_TRANSPOSED(gradient, levels, scales, zero_points, K=inputs, N=rows)


def _to_gather_block_quantized(levels: Any, scales: Any, index: Any) -> Any:
    return _GATHER_BLOCK_QUANTIZED(
        levels, index, scales, bits=8, block_size=BLOCK, gather_axis=0, quantize_axis=1
    )


def _to_reshape(x: Any, shape: list[int]) -> Any:
    return op.Reshape(x, op.Constant(value_ints=list(shape)))


def _to_gelu(x: Any, approximate: str = "none") -> Any:
    return op.Gelu(x, approximate=approximate)


def _to_squeeze(x: Any, dim: Sequence[int]) -> Any:
    return op.Squeeze(x, op.Constant(value_ints=[axis for axis in dim if x.shape[axis] == 1]))


def _to_largest(x: Any, count: int) -> Any:
    _, places = op.TopK(x, op.Constant(value_ints=[count]), axis=-1, sorted=0)
    places.shape, places.dtype = ir.Shape([*x.shape[:-1], count]), ir.DataType.INT64
    return op.Cast(places, to=ir.DataType.INT32)


def _to_pick(x: Any, index: Any) -> Any:
    return op.GatherElements(x, _as_wide(index, x), axis=-1)


def _to_place(kept: Any, index: Any, width: int) -> Any:
    sides = op.Concat(op.Shape(kept, start=0, end=-1), op.Constant(value_ints=[width]), axis=0)
    zeros = op.ConstantOfShape(sides)
    zeros.shape, zeros.dtype = ir.Shape([*kept.shape[:-1], width]), ir.DataType.FLOAT
    return op.ScatterElements(zeros, _as_wide(index, kept), kept, axis=-1)


def _as_wide(index: Any, x: Any) -> Any:
    """Places (B, T, k) repeated over the draws of a tangent (K, B, T, ...)."""
    if len(index.shape) == len(x.shape):
        return index
    count = int(index.shape[-1])
    sides = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[count]), axis=0)
    wide = op.Expand(index, sides)
    wide.shape, wide.dtype = ir.Shape([*x.shape[:-1], count]), ir.DataType.INT32
    return wide


def _name_reshapes_by_position(graph: fx.Graph) -> None:
    """Pass: a reshape to the input's own sizes, constants and at most one other size names its axes by position.

    ONNX Reshape reads 0 as "same as the input's axis here" and -1 as "the rest". Reshapes that need more
    than that are left as they are.
    """
    for node in list(graph.nodes):
        if node.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
            continue
        source, result = node.args[0].meta["val"].shape, node.meta["val"].shape
        sides: list[int] = []
        for axis, side in enumerate(result):
            if not isinstance(side, torch.SymInt):
                sides.append(int(side))
            elif axis < len(source) and str(source[axis]) == str(side):
                sides.append(0)
            else:
                sides.append(-1)
        if sides.count(-1) > 1 or any(
            side == 0 for side in map(int, filter(lambda s: isinstance(s, int), result))
        ):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(torch.ops.edge.reshape_by_position.default, (node.args[0], sides))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _drop_copies(graph: fx.Graph) -> None:
    """Pass: copies that only hint at memory layout mean nothing to the engine."""
    for node in list(graph.nodes):
        if node.target is aten.clone.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _name_axes(model: ir.Model, program: TracedProgram) -> None:
    """Call dynamic axes draws, batch and sequence everywhere, as the program's inputs name them."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in program.axes[str(value.name)].items():
            names[_symbol(value, axis)] = name
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        value.shape = ir.Shape([_named(side, names) for side in value.shape])


def _named(side: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim | str:
    """A side by its name. In decode programs alone sides are added: tokens before and new ones."""
    symbol = str(getattr(side, "value", None))
    if symbol in names:
        return names[symbol]
    return SEEN if BEFORE in names.values() and "+" in symbol else side


def _symbol(value: ir.Value, axis: int) -> str:
    return str(getattr(value.shape[axis], "value", None)) if value.shape is not None else ""


def _shed_debug_data(model: ir.Model) -> None:
    """Node metadata names source files of the exporting machine; a package carries none."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "edge-export", None
