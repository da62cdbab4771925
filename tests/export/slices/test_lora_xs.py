from __future__ import annotations

import numpy as np
import pytest
import torch

from export.slices.lora_xs import LoraXsLinear, factors, fit_core, whitened_factors
from export.slices.sliced_linear import SliceOptions
from tests.export import tiny


def test_the_first_singular_directions_carry_the_core() -> None:
    """A LoRA-XS core equal to the identity adds the best rank-4 approximation of the frozen matrix."""
    model = tiny.make_model("bert", vocab_size=60)
    weight = model.encoder.layer[0].attention.self.query.weight.detach()
    layer = LoraXsLinear(
        "query",
        model.encoder.layer[0].attention.self.query,
        SliceOptions(rank=4, alpha=4.0),
        torch.Generator(),
    )
    layer.up, layer.down = factors(weight, 4, 1.0)
    x = torch.randn(2, 3, tiny.HIDDEN)
    plain = layer(x)
    with torch.no_grad():
        layer.core.copy_(torch.eye(4)[None])
    left, singular, right = torch.linalg.svd(weight.double())
    best = (left[:, :4] * singular[:4]) @ right[:4]
    torch.testing.assert_close(layer(x) - plain, x @ best.float().T, rtol=1e-4, atol=1e-5)


def test_whitened_factors_see_inputs_of_one_variance() -> None:
    """What enters the core is uncorrelated and alike, and its entries move the output as much as LoRA-XS's do."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 8, generator=generator)
    inputs = torch.randn(500, 8, generator=generator) * torch.arange(1, 9)
    moment = (inputs.T @ inputs / 500).double()
    up, down = (each.double() for each in whitened_factors(weight, moment, 3, 1.0))
    inner = down @ moment @ down.T
    torch.testing.assert_close(
        inner / inner.diagonal().mean(), torch.eye(3, dtype=torch.float64), atol=0.01, rtol=0
    )
    own = [each.double() for each in factors(weight, 3, 1.0)]
    moved = [
        torch.einsum("oi,jk,kl,jl->ij", b.square(), a, moment, a).mean().sqrt() for b, a in ((up, down), own)
    ]
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=0)
    # In size and span it is the product of rank 3 that errs least on these inputs (Eckart & Young 1936).
    root = torch.linalg.cholesky(moment)
    wanted, product = weight.double() @ root, up @ down @ root
    product *= (wanted * product).sum() / product.square().sum()
    least = torch.linalg.svdvals(wanted)[3:].norm()
    assert float((wanted - product).norm()) == pytest.approx(float(least), rel=1e-2)


def test_the_nearest_core_and_what_it_misses() -> None:
    """The core of a pair in the span is found exactly; of one across it, the missed part is what is orthogonal."""
    generator = np.random.default_rng(2)
    up, down = generator.standard_normal((20, 3)), np.linalg.qr(generator.standard_normal((12, 5)))[0].T
    up, down = up.astype(np.float32), down.astype(np.float32)
    core = generator.standard_normal((3, 3)).astype(np.float32)
    found, missed = fit_core((down[:3], up @ core / 2, 2.0), up, down[:3])
    np.testing.assert_allclose(found, core, atol=1e-5)
    assert missed < 1e-6
    # Two orthogonal directions of equal size, one in the span: sqrt(1/2) is missed.
    across = np.stack([down[0], down[3], down[0]]), np.stack([up[:, 0], up[:, 0], 0 * up[:, 0]], axis=1), 1.0
    found, missed = fit_core(across, up, down[:3])
    assert missed == pytest.approx(0.5**0.5, abs=1e-6)
    np.testing.assert_allclose(found, np.diag([1.0, 0, 0]), atol=1e-6)
    assert fit_core((0 * down[:3], up, 1.0), up, down[:3])[1] == 0.0
