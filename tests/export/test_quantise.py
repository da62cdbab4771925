import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export.quantise import BLOCK, ZERO_POINT, dequantise, frozen_embedding, frozen_linear, quantise_rows


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
