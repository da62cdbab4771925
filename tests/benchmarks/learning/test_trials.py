"""What trials are made of: frozen factors from activations, and rows of the table."""

from __future__ import annotations

import pytest
import torch

from benchmarks.learning.trials import BASE, flat_factors, principal, table_rows
from export.slices.lora_xs import factors


def test_flattened_factors_move_the_output_alike() -> None:
    """A core's inputs are of one variance, its entries move the output alike, and together as LoRA-XS's do."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 8, generator=generator)
    inputs = torch.randn(500, 8, generator=generator) * torch.arange(1, 9)
    moment = inputs.T @ inputs
    up, down = flat_factors(weight, moment, 3)
    inner = down @ moment @ down.T
    torch.testing.assert_close(inner / inner.diagonal().mean(), torch.eye(3), atol=0.01, rtol=0)
    assert _moved(up, down, moment) == pytest.approx(_moved(*factors(weight, 3, 1.0), moment), rel=1e-3)
    columns = up.square().sum(dim=0)
    assert columns.max() / columns.min() < 1.001


def test_principal_factors_take_the_largest_inputs() -> None:
    """EVA's rows span the directions in which inputs are largest."""
    weight, moment = (
        torch.randn(6, 5, generator=torch.Generator().manual_seed(2)),
        torch.diag(torch.arange(1.0, 6.0)),
    )
    up, down = principal(weight, moment, 2)
    torch.testing.assert_close(down.abs().sum(dim=0), torch.tensor([0.0, 0, 0, 1, 1]))
    assert _moved(up, down, moment) == pytest.approx(_moved(*factors(weight, 2, 1.0), moment), rel=1e-3)


def test_gains_are_of_the_seeds_that_both_have() -> None:
    """A trial is compared with the tuned rate seed by seed."""
    found = {
        BASE: {0: {"accuracy": 80.0, "loss": 0.5}, 1: {"accuracy": 90.0, "loss": 0.4}},
        "auto": {1: {"accuracy": 91.0, "loss": 0.3}, 2: {"accuracy": 10.0, "loss": 2.0}},
    }
    (row,) = (row for row in table_rows(found) if row.unit == "points")
    assert (row.value, row.low, row.high) == (1.0, 1.0, 1.0)


def _moved(up: torch.Tensor, down: torch.Tensor, moment: torch.Tensor) -> float:
    """Root mean square over a core's entries of what they move the output by."""
    entries = torch.einsum("oi,jk,kl,jl->ij", up.square(), down, moment, down)
    return float(entries.mean().sqrt())
