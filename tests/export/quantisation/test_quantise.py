import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export.quantisation.quantise import (
    BLOCK,
    INT4_BLOCK,
    ZERO_POINT,
    MatrixKind,
    dequantise,
    frozen_embedding,
    frozen_linear,
    quantise,
    quantise_rows,
    stored_format,
    stored_parts,
)


def random_matrix(seed: int, rows: int, blocks: int, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, blocks * BLOCK, generator=generator) * size


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    exponent=st.integers(-20, 20),
)
def test_a_weight_returns_within_half_a_level(seed: int, rows: int, blocks: int, exponent: int) -> None:
    """Quantised and back, each weight is off by at most half its block's scale, whatever the magnitude."""
    weight = random_matrix(seed, rows, blocks, 2.0**exponent)
    levels, scales = quantise_rows(weight)
    assert levels.shape == (rows, blocks, BLOCK)
    assert scales.shape == (rows, blocks)
    error = (weight - dequantise(levels, scales)).abs().reshape(rows, blocks, BLOCK)
    # The division is rounded to float32 before the level is: 1e-5 of a scale covers it at 127 levels.
    assert (error <= scales[:, :, None] * (0.5 + 1e-5)).all()


def test_blocks_are_scaled_by_their_own_largest_weight() -> None:
    """The largest weight of each block comes back exactly to rounding, however small its block is beside others."""
    weight = random_matrix(0, 3, 4)
    weight[:, BLOCK : 2 * BLOCK] *= 1e-6
    levels, scales = quantise_rows(weight)
    blocks = weight.reshape(3, 4, BLOCK)
    torch.testing.assert_close(scales * 127, blocks.abs().amax(-1), rtol=1e-6, atol=0)
    assert ((levels.int() - ZERO_POINT).abs().amax(-1) == 127).all()


def test_zero_blocks_are_exact() -> None:
    """A block of zeros has scale zero and comes back as zeros, without a division by zero."""
    weight = random_matrix(1, 2, 3)
    weight[0] = 0
    weight[1, BLOCK : 2 * BLOCK] = 0
    levels, scales = quantise_rows(weight)
    back = dequantise(levels, scales)
    assert torch.isfinite(scales).all()
    assert (back[0] == 0).all()
    assert (back[1, BLOCK : 2 * BLOCK] == 0).all()
    assert (levels[0] == ZERO_POINT).all()


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    """A row length that BLOCK does not divide is a ValueError that gives both numbers."""
    with pytest.raises(ValueError, match="33 is not a multiple of 32"):
        quantise_rows(torch.zeros(2, 33))


def one_node(operator: str, inputs: dict[str, np.ndarray], output_rank: int, **attributes: int) -> np.ndarray:
    """Run one operator of ONNX Runtime's own domain."""
    kinds = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node(operator, list(inputs), ["y"], domain="com.microsoft", **attributes)],
        "one",
        [helper.make_tensor_value_info(name, kinds[str(a.dtype)], a.shape) for name, a in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * output_rank)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 3), (64, 2)])
def test_matmul_nbits_computes_with_our_layout(rows: int, blocks: int) -> None:
    """ONNX Runtime's MatMulNBits on our levels and scales is the product with the dequantised matrix."""
    levels, scales = quantise_rows(random_matrix(2, rows, blocks))
    x = random_matrix(3, 7, blocks)
    got = one_node(
        "MatMulNBits",
        {"x": x.numpy(), "levels": levels.numpy(), "scales": scales.numpy()},
        2,
        K=blocks * BLOCK,
        N=rows,
        bits=8,
        block_size=BLOCK,
        accuracy_level=1,
    )
    expected = frozen_linear(x, levels, scales, None, None, 1)
    torch.testing.assert_close(expected, x @ dequantise(levels, scales).T)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_matmul_nbits_computes_with_our_four_bits(blocks: int) -> None:
    """MatMulNBits with 4 bits on our parts, an odd number of zero points too, is the product with our matrix."""
    weight = random_matrix(2, BLOCK + 3, blocks * INT4_BLOCK // BLOCK) + 0.3
    parts = quantise(weight, "linear", "int4")
    x = random_matrix(3, 7, blocks * INT4_BLOCK // BLOCK)
    got = one_node(
        "MatMulNBits",
        {"x": x.numpy(), **{name: part.numpy() for name, part in parts.items()}},
        2,
        K=blocks * INT4_BLOCK,
        N=BLOCK + 3,
        bits=4,
        block_size=INT4_BLOCK,
        accuracy_level=1,
    )
    expected = frozen_linear(x, parts["levels"], parts["scales"], parts["zero_points"], None, 1)
    torch.testing.assert_close(expected, x @ dequantise(**parts).T)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-4)


def test_four_bits_are_packed_low_half_first() -> None:
    """By hand, weights -2 to 13 in turn are levels 0 to 15 around zero point 2 with scale 1: bytes 0x10, 0x32, on."""
    weight = (torch.arange(INT4_BLOCK) % 16 - 2.0).expand(BLOCK, INT4_BLOCK)
    parts = quantise(weight, "linear", "int4")
    expected = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * (INT4_BLOCK // 16)
    assert parts["levels"][0, 0].tolist() == expected
    assert parts["zero_points"][0].tolist() == [0x02]
    assert parts["scales"][0].tolist() == [1.0]
    assert torch.equal(dequantise(**parts), weight)


@pytest.mark.parametrize("shape", [(64, 96), (64, 64), (32, 33), (31, 64), (40, 32)])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("quantisation", ["int8", "int4"])
def test_parts_are_what_was_announced(kind: MatrixKind, quantisation: str, shape: tuple[int, int]) -> None:
    """Shapes and types told from the shape alone are those of the tensors made; what has no parts is refused."""
    weight = random_matrix(8, shape[0], 4)[:, : shape[1]]
    announced = stored_parts(kind, quantisation, shape)
    if not announced:
        with pytest.raises(ValueError, match="is not quantised"):
            quantise(weight, kind, quantisation)
        return
    made = quantise(weight, kind, quantisation)
    assert {name: (tuple(part.shape), part.dtype) for name, part in made.items()} == announced


@pytest.mark.parametrize(
    ("kind", "quantisation", "shape", "stored"),
    [
        ("linear", "int8", (32, 64), "int8"),
        ("linear", "int4", (32, 64), "int4"),
        ("linear", "none", (32, 64), None),
        ("linear", "int4", (31, 64), None),
        ("linear", "int4", (32, 65), None),
        ("embedding", "int4", (3, 64), "int8"),
        ("embedding", "int8", (3, 65), None),
    ],
)
def test_which_matrices_are_quantised(
    kind: MatrixKind, quantisation: str, shape: tuple[int, int], stored: str | None
) -> None:
    """Embeddings are int8 even in int4; rows that are not whole blocks, and a slice's few rows, stay float."""
    assert stored_format(kind, quantisation, shape) == stored


def test_an_embedding_and_a_linear_of_one_matrix_share_their_int8_bytes() -> None:
    """Tied matrices can be written once in int8: levels and scales of both uses are equal byte by byte."""
    weight = random_matrix(9, 40, 3)
    linear, embedding = (quantise(weight, kind, "int8") for kind in ("linear", "embedding"))
    assert torch.equal(linear["levels"].flatten(), embedding["levels"].flatten())
    assert torch.equal(linear["scales"], embedding["scales"])


def test_gather_block_quantized_reads_our_layout() -> None:
    """ONNX Runtime's GatherBlockQuantized on our flat levels gives the dequantised rows."""
    levels, scales = quantise_rows(random_matrix(4, 9, 2))
    index = torch.tensor([[0, 8], [3, 3]])
    got = one_node(
        "GatherBlockQuantized",
        {"levels": levels.flatten(1).numpy(), "index": index.numpy(), "scales": scales.numpy()},
        3,
        bits=8,
        block_size=BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    expected = dequantise(levels, scales)[index]
    torch.testing.assert_close(frozen_embedding(levels.flatten(1), scales, index), expected)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_the_reference_is_differentiable_in_its_input() -> None:
    """The quantised product's gradient in its input is that of a linear layer with the dequantised matrix."""
    levels, scales = quantise_rows(random_matrix(5, 4, 2))
    x = random_matrix(6, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: frozen_linear(v, levels, scales, None, None, 4), (x,))
