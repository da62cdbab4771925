"""The arithmetics of a lowered program: how its frozen products are computed on a device.

The lowered program names each frozen product as one node, ``MatMulNBits``. From it come

* ``block_int8`` and ``block_int4``: that node as it is. Activations in int8, weights as they are stored, in int8 or
  int4 with a scale for each block of inputs. The engine repacks such a weight for its kernels, so it must be *bound*
  when the program is loaded.
* ``row_int8``: activations in uint8, or signed in int8, with one scale a row (a token), weights in int8 with one scale
  an output, products summed in int32 (``QuantizeLinear`` and ``MatMulIntegerToFloat``; Dettmers et al. 2022, arXiv
  2208.07339, section 2.1, calls it vector-wise). Weights are *fed* as inputs, as they lie in a mapped file: one
  loaded program serves every block. Primal and tangents have their own scales.
* ``float``: the dequantised weight in float32, fed.

A product with the transposed matrix, of adjoint programs, is exact in float in both fed arithmetics: the engine reads
the fed (inputs, outputs) matrix transposed as it multiplies. ``row_int8`` scales the cotangent by the column scales and
turns int8 into float a band of rows at a time (``BAND_BYTES``), so that no whole matrix is ever held in float.
``block_int8`` has none: the engine's repacked weight cannot be read transposed.

With x a row, s = max|x|/127 and q = round(x/s) + 128, the product is (q - 128)·W8 · s · w, w the column scales. Signed,
q is round(x/s) and nothing is taken off; sums are of the same integers, so results are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_runtime.engines.names import OUTPUT_SUFFIX
from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import (
    BLOCK_ARITHMETICS,
    FLOAT_SUFFIX,
    INT8_SCALES_SUFFIX,
    INT8_SUFFIX,
    LEVELS_SUFFIX,
    SCALES_SUFFIX,
    ZERO_POINTS_SUFFIX,
    Arithmetic,
)
from export.lowering.onnx import TRANSPOSED

#: Activations are rounded to ±127 around this level.
ACTIVATION_ZERO_POINT = 128
#: Keeps the scale of a row of zeros above zero.
SMALLEST_MAXIMUM = 1e-30
#: A side of a shape: a number, or a name of what it stands for.
Side = int | str | ir.SymbolicDim
_ENGINE_DOMAIN = "com.microsoft"
_LINEAR = "MatMulNBits"
#: Size of a band of a matrix in float, in bytes, near what a core's cache holds; and the fewest rows of a band.
BAND_BYTES, BAND_ROWS = 2 << 20, 64
#: The file that bound weights are said to lie in. It is never read: the runtime hands the weights over before.
UNREAD_FILE = "bound-by-the-runtime"


#: Fed arithmetics whose results have the same bits when the engine packs the matrices: sums of integers.
PACKED_ARITHMETICS: tuple[Arithmetic, ...] = ("row_int8",)


def with_arithmetic(
    model: ir.Model, arithmetic: Arithmetic, *, packed: bool = False, signed: bool = False
) -> ir.Model:
    """A copy of a lowered program that computes its frozen products in the given arithmetic.

    Args:
        model: program that ``export.lowering.onnx`` lowered, whose frozen tensors are all inputs; left as it is.
        arithmetic: arithmetic to compute in.
        packed: whether the matrices of ``row_int8`` are bound too, so that the engine packs them when it loads.
        signed: whether ``row_int8`` rounds activations to int8 instead of uint8.

    Returns:
        The program. For ``block_int8`` and ``block_int4`` the repacked weights are external initialisers without
        data, named as before; otherwise every weight is an input, and ``X_levels``, ``X_scales``, ``X_zero_points``
        are replaced by ``X_int8`` and ``X_int8_scales`` or by ``X_float``.

    Raises:
        ModelError: the program has transposed products and the arithmetic is a block arithmetic.
    """
    copied: ir.Model = ir.from_proto(ir.to_proto(model))
    if arithmetic in BLOCK_ARITHMETICS:
        if any(node.op_type == TRANSPOSED for node in copied.graph):
            raise ModelError(
                "a repacked weight cannot be read transposed: block arithmetics have no adjoint programs"
            )
        _bind(copied, {value for node in _linears(copied) for value in node.inputs[1:4] if value is not None})
    else:
        _Rewriter(copied, arithmetic, _Rounding.signed() if signed else _Rounding.unsigned()).run()
        if packed:
            suffixes = (INT8_SUFFIX, INT8_SCALES_SUFFIX)
            _bind(copied, {value for value in copied.graph.inputs if str(value.name).endswith(suffixes)})
    return copied


def has_frozen_products(model: ir.Model) -> bool:
    """Whether arithmetics differ for a program at all."""
    return any(node.op_type in (_LINEAR, TRANSPOSED) for node in model.graph)


def rounds_activations(model: ir.Model) -> bool:
    """Whether a program's activations are rounded in ``row_int8``; cotangents, of transposed products, are not."""
    return any(node.op_type == _LINEAR for node in model.graph)


def _bind(model: ir.Model, bound: Set[ir.Value]) -> None:
    """Turn weights of frozen products from inputs into external initialisers, bound by the runtime."""
    offset = 0
    for value in [value for value in model.graph.inputs if value in bound]:
        name, dtype, shape = str(value.name), _dtype(value), _static(value)
        size = math.prod(shape) * int(dtype.itemsize)
        value.const_value = ir.ExternalTensor(
            UNREAD_FILE, offset, size, dtype, shape=ir.Shape(shape), name=name
        )
        model.graph.inputs.remove(value)
        model.graph.initializers[name] = value
        offset += size


@dataclass(frozen=True)
class _Rounding:
    """What activations are rounded to: a type, and the level that stands for zero."""

    dtype: ir.DataType
    zero_point: np.uint8 | np.int8

    @classmethod
    def unsigned(cls) -> _Rounding:
        return cls(ir.DataType.UINT8, np.uint8(ACTIVATION_ZERO_POINT))

    @classmethod
    def signed(cls) -> _Rounding:
        return cls(ir.DataType.INT8, np.int8(0))


class _Rewriter:
    """Replaces frozen products; inputs that several products share are quantised once."""

    def __init__(self, model: ir.Model, arithmetic: Arithmetic, rounding: _Rounding) -> None:
        self._rounding = rounding
        self._graph = model.graph
        self._arithmetic = arithmetic
        self._linears = [node for node in model.graph if node.op_type in (_LINEAR, TRANSPOSED)]
        self._inputs = {value.name: value for value in model.graph.inputs}
        self._quantised: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._constants: dict[str, ir.Value] = {}

    def run(self) -> None:
        for node in self._linears:
            made = list(self._product(node) if node.op_type == _LINEAR else self._transposed(node))
            result = made[-1].outputs[0]
            old = node.outputs[0]
            result.name, result.shape, result.type = old.name, old.shape, old.type
            self._graph.insert_before(node, made)
            ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
            self._graph.remove(node, safe=True)
        used = {value for node in self._graph for value in node.inputs}
        stored = (LEVELS_SUFFIX, SCALES_SUFFIX, ZERO_POINTS_SUFFIX)
        for value in [v for v in self._graph.inputs if str(v.name).endswith(stored)]:
            if value not in used and not str(value.name).endswith(INT8_SCALES_SUFFIX):
                self._graph.inputs.remove(value)

    def _product(self, node: ir.Node) -> Iterator[ir.Node]:
        x, levels, bias = node.inputs[0], node.inputs[1], (node.inputs[5] if len(node.inputs) > 5 else None)
        if x is None or levels is None or x.shape is None:
            raise ModelError(f"frozen product {node.name} of the lowered program has no shape")
        stem = str(levels.name).removesuffix(LEVELS_SUFFIX)
        size = (node.attributes["K"].as_int(), node.attributes["N"].as_int())
        shape = [*x.shape[:-1], size[1]]
        if self._arithmetic == "float":
            matrix = self._weight(stem + FLOAT_SUFFIX, ir.DataType.FLOAT, size)
            product = _node("MatMul", [x, matrix], ir.DataType.FLOAT, shape)
            yield product
        else:
            if x not in self._quantised:
                yield from self._quantise(x)
            levels_of_x, row_scales = self._quantised[x]
            matrix = self._weight(stem + INT8_SUFFIX, ir.DataType.INT8, size)
            columns = self._weight(stem + INT8_SCALES_SUFFIX, ir.DataType.FLOAT, size[1:])
            inputs = [levels_of_x, matrix, self._constant("one", np.float32(1)), columns]
            inputs.append(self._constant("activation_zero_point", self._rounding.zero_point))
            summed = _node("MatMulIntegerToFloat", inputs, ir.DataType.FLOAT, shape, domain=_ENGINE_DOMAIN)
            yield summed
            product = _node("Mul", [summed.outputs[0], row_scales], ir.DataType.FLOAT, shape)
            yield product
        if bias is not None:
            yield _node("Add", [product.outputs[0], bias], ir.DataType.FLOAT, shape)

    def _transposed(self, node: ir.Node) -> Iterator[ir.Node]:
        """The product of a cotangent (..., N) with the transposed weight, (..., K)."""
        bar, levels = node.inputs[0], node.inputs[1]
        if bar is None or levels is None or bar.shape is None:
            raise ModelError(f"transposed product {node.name} of the lowered program has no shape")
        stem = str(levels.name).removesuffix(LEVELS_SUFFIX)
        inner, outer = node.attributes["K"].as_int(), node.attributes["N"].as_int()
        leading = list(bar.shape[:-1])
        if self._arithmetic == "float":
            matrix = self._weight(stem + FLOAT_SUFFIX, ir.DataType.FLOAT, (inner, outer))
            yield _times_transposed(bar, matrix, [*leading, inner])
            return
        matrix = self._weight(stem + INT8_SUFFIX, ir.DataType.INT8, (inner, outer))
        columns = self._weight(stem + INT8_SCALES_SUFFIX, ir.DataType.FLOAT, (outer,))
        scaled = _node("Mul", [bar, columns], ir.DataType.FLOAT, list(bar.shape))
        yield scaled
        rows, parts = max(BAND_ROWS, BAND_BYTES // (4 * outer)), []
        for start in range(0, inner, rows):
            end = min(inner, start + rows)
            band, shape = matrix, (end - start, outer)
            if end - start < inner:
                limits = [self._index(start), self._index(end), self._index(0)]
                sliced = _node("Slice", [matrix, *limits], ir.DataType.INT8, shape)
                yield sliced
                band = sliced.outputs[0]
            cast = _node("Cast", [band], ir.DataType.FLOAT, shape)
            cast.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
            yield cast
            part = _times_transposed(scaled.outputs[0], cast.outputs[0], [*leading, end - start])
            yield part
            parts.append(part.outputs[0])
        if len(parts) > 1:
            joined = _node("Concat", parts, ir.DataType.FLOAT, [*leading, inner])
            joined.attributes["axis"] = ir.AttrInt64("axis", -1)
            yield joined

    def _index(self, number: int) -> ir.Value:
        return self._constant(f"index_{number}", np.array([number], np.int64))

    def _quantise(self, x: ir.Value) -> Iterator[ir.Node]:
        """Nodes that give x rounded and one scale a row."""
        if x.shape is None:
            raise ModelError(f"value {x.name} of the lowered program has no shape")
        leading, columns = list(x.shape[:-1]), x.shape[-1]
        if not isinstance(columns, int):
            raise ModelError(f"value {x.name} of the lowered program has a dynamic last axis")
        rows = "*".join(str(getattr(side, "value", side)) for side in leading)
        last = self._constant("last_axis", np.array([-1], np.int64))
        # The largest magnitude from two reductions, so that no tensor of |x| is held.
        top = _node("ReduceMax", [x, last], ir.DataType.FLOAT, [*leading, 1])
        bottom = _node("ReduceMin", [x, last], ir.DataType.FLOAT, [*leading, 1])
        negated = _node("Neg", [bottom.outputs[0]], ir.DataType.FLOAT, [*leading, 1])
        smallest = self._constant("smallest_maximum", np.float32(SMALLEST_MAXIMUM))
        largest = _node(
            "Max", [top.outputs[0], negated.outputs[0], smallest], ir.DataType.FLOAT, [*leading, 1]
        )
        scales = _node(
            "Mul",
            [largest.outputs[0], self._constant("one_over_127", np.float32(1 / 127))],
            ir.DataType.FLOAT,
            [*leading, 1],
        )
        # QuantizeLinear takes one scale a row of a matrix only: flatten, quantise, give back the shape.
        flat = _node("Reshape", [x, self._shape(-1, columns)], ir.DataType.FLOAT, [rows, columns])
        flat_scales = _node("Reshape", [scales.outputs[0], self._shape(-1)], ir.DataType.FLOAT, [rows])
        count = _node("Shape", [flat_scales.outputs[0]], ir.DataType.INT64, [1])
        rounding = self._rounding
        zero_points = _node("ConstantOfShape", [count.outputs[0]], rounding.dtype, [rows])
        zero_points.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array([rounding.zero_point])))
        levels = _node(
            "QuantizeLinear",
            [flat.outputs[0], flat_scales.outputs[0], zero_points.outputs[0]],
            rounding.dtype,
            [rows, columns],
        )
        levels.attributes["axis"] = ir.AttrInt64("axis", 0)
        shape = _node("Shape", [x], ir.DataType.INT64, [len(x.shape)])
        shaped = _node("Reshape", [levels.outputs[0], shape.outputs[0]], rounding.dtype, list(x.shape))
        self._quantised[x] = (shaped.outputs[0], scales.outputs[0])
        yield from (top, bottom, negated, largest, scales, flat, flat_scales, count, zero_points, levels)
        yield from (shape, shaped)

    def _weight(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        if name not in self._inputs:
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            self._inputs[name] = value
            self._graph.inputs.append(value)
        return self._inputs[name]

    def _shape(self, *sides: int) -> ir.Value:
        return self._constant("shape_" + "_".join(map(str, sides)), np.array(sides, np.int64))

    def _constant(self, name: str, array: object) -> ir.Value:
        name = f"arithmetic_{name}"
        if name not in self._constants:
            self._constants[name] = _constant_of(self._graph, name, array)
        return self._constants[name]


def _linears(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in list(model.graph) if node.op_type == _LINEAR)


def _node(
    operator: str, inputs: list[ir.Value], dtype: ir.DataType, shape: Sequence[Side], domain: str = ""
) -> ir.Node:
    output = ir.Value(shape=ir.Shape(shape), type=ir.TensorType(dtype))
    return ir.Node(domain, operator, inputs, outputs=[output])


def _times_transposed(bar: ir.Value, matrix: ir.Value, shape: Sequence[Side]) -> ir.Node:
    """bar · matrixᵀ, the matrix read where it lies."""
    node = _node("FusedMatMul", [bar, matrix], ir.DataType.FLOAT, shape, domain=_ENGINE_DOMAIN)
    node.attributes["transB"] = ir.AttrInt64("transB", 1)
    return node


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ModelError(f"frozen tensor {value.name} has no type in the lowered program")
    return value.dtype


def _static(value: ir.Value) -> list[int]:
    sides = [side for side in value.shape or () if isinstance(side, int)]
    if value.shape is None or len(sides) != len(value.shape):
        raise ModelError(f"frozen tensor {value.name} has no static shape in the lowered program")
    return sides


def probe() -> ir.Model:
    """The smallest int8 product, by which a device finds out whether its kernel is exact at the extremes.

    Kernels for CPUs without dot-product instructions may add pairs of products in 16 bits and saturate.
    """
    quantised = ir.Value(name="x", shape=ir.Shape(["rows", "inner"]), type=ir.TensorType(ir.DataType.UINT8))
    matrix = ir.Value(name="matrix", shape=ir.Shape(["inner", "outer"]), type=ir.TensorType(ir.DataType.INT8))
    graph = ir.Graph(
        [quantised, matrix], [], nodes=[], opset_imports={"": 20, _ENGINE_DOMAIN: 1}, name="probe"
    )
    one = _constant_of(graph, "one", np.float32(1))
    node = _node(
        "MatMulIntegerToFloat",
        [quantised, matrix, one, one],
        ir.DataType.FLOAT,
        ["rows", "outer"],
        domain=_ENGINE_DOMAIN,
    )
    node.outputs[0].name = "product" + OUTPUT_SUFFIX
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=10, producer_name="edge-export")


def _constant_of(graph: ir.Graph, name: str, array: object) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(np.asarray(array).shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.initializers[name] = value
    return value
