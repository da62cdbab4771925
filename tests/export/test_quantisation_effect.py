"""The effect of quantisation: gradients a segment at a time, and what few bits change on real text."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor

from edge_runtime.package import QuantisationEffect
from export.capture import Capture, capture
from export.model import load_model
from export.quantisation_effect import quantisation_effect, segmentwise_gradients
from export.quantise_graph import quantise_capture
from export.reference import TorchReference
from export.self_check import torch_inputs
from tests.export import tiny

DRAWS = 3


@pytest.fixture(scope="module")
def captured(tiny_model, tmp_path_factory) -> Capture:
    """The tiny model in float32, not yet quantised."""
    chosen = tiny.options(tiny_model, tmp_path_factory.mktemp("unused"))
    return capture(load_model(chosen.model, len(chosen.labels), chosen.slices))


@pytest.fixture(scope="module")
def batch(exported) -> dict[str, Tensor]:
    """Real text as the reference takes it."""
    return torch_inputs(tiny.make_text_batch(exported.package))


def slices_of(reference: TorchReference) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in tiny.moved_slices(reference).items()}


def effect_of(captured: Capture, batch: dict[str, Tensor], quantisation: str) -> QuantisationEffect:
    plain = copy.deepcopy(captured.segments)
    quantised, tensors = quantise_capture(copy.deepcopy(captured), quantisation)
    slices = slices_of(TorchReference(plain, captured.tensors))
    generator = torch.Generator().manual_seed(1)
    directions = {
        name: torch.randn(DRAWS, len(batch["labels"]), *value.shape[1:], generator=generator)
        for name, value in slices.items()
        if not name.startswith("head.")
    }
    return quantisation_effect(plain, quantised, tensors.__getitem__, batch, slices, directions)


def test_gradients_by_segments_are_those_of_the_whole(captured, batch) -> None:
    """Loss and per-example gradients equal one backward pass through all segments."""
    reference = TorchReference(captured.segments, captured.tensors)
    slices = slices_of(reference)
    loss, expected = reference.example_gradients(batch, slices)
    assert len(expected) == 2 * tiny.BLOCKS
    got_loss, got = segmentwise_gradients(
        captured.segments, captured.tensors.__getitem__, batch, slices, tuple(expected)
    )
    torch.testing.assert_close(got_loss, loss)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_slice_that_segments_share_gets_the_sum_of_its_gradients(captured, batch) -> None:
    """With both blocks on the first one's slices, a gradient is that of the whole chain in the shared values."""
    segments = copy.deepcopy(captured.segments)
    segments[2].slices = dict(zip(segments[2].slices, segments[1].slices.values(), strict=True))
    reference = TorchReference(segments, captured.tensors)
    slices = slices_of(TorchReference(captured.segments, captured.tensors))
    wanted = tuple(segments[1].slices.values())
    used = {n: value for n, value in slices.items() if n in wanted or n.startswith("head.")}
    _, expected = reference.example_gradients(batch, used)
    _, got = segmentwise_gradients(segments, captured.tensors.__getitem__, batch, slices, wanted)
    for name in wanted:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def test_one_segments_tensors_are_held_at_a_time(captured, batch) -> None:
    """Frozen tensors are asked for when their segment runs and let go after it, forwards and backwards."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def tensor(name: str) -> Tensor:
        nonlocal most
        made = captured.tensors[name].clone()
        alive.add(made)
        most = max(most, len(alive))
        return made

    slices = slices_of(TorchReference(captured.segments, captured.tensors))
    wanted = tuple(name for name in slices if not name.startswith("head."))
    segmentwise_gradients(captured.segments, tensor, batch, slices, wanted)
    assert most <= max(len(segment.weights) for segment in captured.segments)


def test_fewer_bits_change_more(captured, batch) -> None:
    """Unquantised is exactly itself; int8 is close; int4 is farther off in both figures, but points the same way."""
    none, int8, int4 = (effect_of(captured, batch, name) for name in ("none", "int8", "int4"))
    assert none.rows == len(batch["labels"])
    assert none.loss == 0
    assert none.jvp_cosine == pytest.approx(1, abs=1e-6)
    assert 0 < int8.loss < int4.loss < 0.1
    assert 0.9 < int4.jvp_cosine < int8.jvp_cosine < 1
