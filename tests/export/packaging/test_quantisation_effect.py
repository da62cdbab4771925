"""The effect of quantisation on real text, and the reference it is measured with: gradients a segment at a time."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from edge_runtime.package.manifest import QuantisationEffect
from export.capture.segment import SegmentGraph
from export.model.load import load_model
from export.packaging.quantisation_effect import quantisation_effect
from export.packaging.self_check import torch_inputs
from export.packaging.torch_reference import TorchReference
from export.quantisation.stored import StoredModel, store
from tests.export import tiny

DRAWS = 3


def stored_as(model, folder, quantisation: str) -> StoredModel:
    chosen = tiny.options(model, folder)
    return store(load_model(chosen.model, len(chosen.labels), chosen.slices), quantisation)


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory) -> TorchReference:
    """The tiny model in float32."""
    stored = stored_as(tiny_model, tmp_path_factory.mktemp("unused"), "none")
    return TorchReference(stored.segments, stored.in_memory())


@pytest.fixture(scope="module")
def batch(exported) -> dict[str, Tensor]:
    """Real text as the reference takes it."""
    return torch_inputs(tiny.make_text_batch(exported.package))


def whole_model_gradients(
    segments: tuple[SegmentGraph, ...],
    tensors: Mapping[str, Tensor],
    batch: dict[str, Tensor],
    slices: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The same by one backward pass through all segments at once."""
    leaves = {
        name: value.expand(len(batch["labels"]), *value.shape[1:]).clone().requires_grad_()
        for name, value in slices.items()
        if not name.startswith("head.")
    }
    loss = TorchReference(segments, tensors).run(batch, {**slices, **leaves})["loss"]
    return dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))


def test_gradients_by_segments_are_those_of_the_whole(plain, exported, batch) -> None:
    """Loss and per-example gradients equal one backward pass through all segments."""
    reference = exported.reference
    slices = tiny.moved_slices(reference)
    loss, got = reference.example_gradients(batch, slices)
    expected = whole_model_gradients(exported.stored.segments, reference.tensors, batch, slices)
    torch.testing.assert_close(loss, reference.run(batch, slices)["loss"])
    assert len(got) == 2 * tiny.BLOCKS
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_slice_that_segments_share_gets_the_sum_of_its_gradients(exported, batch) -> None:
    """With both blocks on the first one's slices, a gradient is that of the whole chain in the shared values."""
    segments = copy.deepcopy(exported.stored.segments)
    segments[2].slices = dict(zip(segments[2].slices, segments[1].slices.values(), strict=True))
    tensors = exported.reference.tensors
    reference = TorchReference(segments, tensors)
    slices = tiny.moved_slices(reference)
    _, got = reference.example_gradients(batch, slices)
    expected = whole_model_gradients(segments, tensors, batch, slices)
    assert set(got) == set(segments[1].slices.values())
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


class _Counted(Mapping[str, Tensor]):
    """Hands out copies, and remembers how many of them were alive at once."""

    def __init__(self, tensors: Mapping[str, Tensor], counted: set[str]) -> None:
        self.tensors, self.counted = tensors, counted
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        made = self.tensors[name].clone()
        if name in self.counted:
            self.alive.add(made)
            self.most = max(self.most, len(self.alive))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_one_segments_tensors_are_held_at_a_time(exported, batch) -> None:
    """Frozen tensors are asked for when their segment runs and let go after it, forwards and backwards."""
    segments = exported.stored.segments
    frozen = {source for segment in segments for source in segment.weights.values()}
    tensors = _Counted(exported.reference.tensors, frozen)
    reference = TorchReference(segments, tensors)
    reference.example_gradients(batch, tiny.moved_slices(reference))
    assert 0 < tensors.most <= max(len(segment.weights) for segment in segments)


def test_fewer_bits_change_more(plain, tiny_model, batch, tmp_path) -> None:
    """Unquantised is exactly itself; int8 is close; int4 is farther off in both figures, but points the same way."""
    slices = tiny.moved_slices(plain)
    generator = torch.Generator().manual_seed(1)
    directions = {
        name: torch.randn(DRAWS, len(batch["labels"]), *value.shape[1:], generator=generator)
        for name, value in slices.items()
        if not name.startswith("head.")
    }

    def effect_of(quantisation: str) -> QuantisationEffect:
        stored = stored_as(tiny_model, tmp_path / quantisation, quantisation)
        quantised = TorchReference(stored.segments, stored.in_memory())
        return quantisation_effect(plain, quantised, batch, slices, directions)

    none, int8, int4 = effect_of("none"), effect_of("int8"), effect_of("int4")
    assert none.rows == len(batch["labels"])
    assert none.loss == 0
    assert none.jvp_cosine == pytest.approx(1, abs=1e-6)
    assert 0 < int8.loss < int4.loss < 0.1
    assert 0.9 < int4.jvp_cosine < int8.jvp_cosine < 1
