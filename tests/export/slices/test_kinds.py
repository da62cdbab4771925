from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edge_runtime.errors import ModelError
from edge_runtime.slices.kinds import KINDS as KNOWN
from export.slices.kinds import KINDS
from export.slices.sliced_linear import SlicedLinear, SliceOptions

OUT, INPUTS, RANK = 12, 8, 3


def make(kind: str) -> SlicedLinear:
    """A layer with a slice, its frozen tensors filled in and its trained ones random."""
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUT)
    layer = KINDS[kind](
        "it", linear, SliceOptions(kind, rank=RANK, density=0.3), torch.Generator().manual_seed(1)
    )
    for name, value in layer.frozen_of(linear.weight.detach()).items():
        setattr(layer, name, value)
    for name in layer.TRAINED:
        parameter = layer.get_parameter(name)
        parameter.data = torch.randn_like(parameter)
    return layer.requires_grad_(False)


def parts(layer: SlicedLinear) -> tuple[dict[str, np.ndarray], object]:
    values = {name: layer.get_parameter(name).numpy() for name in layer.TRAINED}
    return values, lambda name: layer.get_buffer(name).numpy()


def test_exporter_and_device_know_the_same_kinds() -> None:
    """Each kind that a manifest may name has a class in the exporter, with the same trained tensors."""
    assert set(KINDS) == set(KNOWN)
    for name, kind in KINDS.items():
        assert KNOWN[name].tensors == kind.TRAINED


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_change_of_the_weight_is_what_the_slice_adds(kind: str) -> None:
    """A layer whose weight is changed as a merge changes it computes what the layer with the slice does."""
    layer = make(kind)
    values, frozen = parts(layer)
    x = torch.randn(2, 5, INPUTS)
    expected = layer(x)
    layer.linear.weight += layer.change("it", values, frozen, (OUT, INPUTS))
    torch.testing.assert_close(layer.linear(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(name for name in KINDS if KNOWN[name].pair or name == "lora_xs"))
def test_a_slice_starts_from_the_pair_that_it_gives(kind: str) -> None:
    """The pair of trained values is one that a slice of the same kind can start from, and computes the same."""
    layer = make(kind)
    values, frozen = parts(layer)
    pair = layer.pair("it", values, frozen)
    started = layer.start("it", "target", pair, frozen)
    before = layer.change("it", values, frozen, (OUT, INPUTS))
    torch.testing.assert_close(
        layer.change("it", started, frozen, (OUT, INPUTS)), before, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_options_are_read_off_the_tensors(kind: str) -> None:
    """The shapes of a slice's tensors give options that make tensors of these shapes, whatever the scale."""
    layer = make(kind)
    shapes = {name: tuple(layer.get_parameter(name).shape) for name in layer.TRAINED}
    again = KINDS[kind]("it", layer.linear, layer.options_of(shapes), torch.Generator())
    assert {name: tuple(again.get_parameter(name).shape) for name in again.TRAINED} == shapes


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tokens_must_have_an_axis_of_their_own(kind: str) -> None:
    """An input whose examples and tokens are one axis is refused: a slice could have no direction for each example."""
    with pytest.raises(ModelError, match="joined to one axis"):
        make(kind)(torch.randn(10, INPUTS))
