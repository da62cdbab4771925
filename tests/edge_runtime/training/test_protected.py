"""Contributions as vectors: layouts, clipping, noise, integers; what travels wrongly is refused."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load, save

from edge_runtime.errors import SliceError
from edge_runtime.package.manifest import Manifest, parse_manifest
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol.messages import Protection, Task
from edge_runtime.protocol.signing import generate_key
from edge_runtime.training.protected import (
    VECTOR,
    clipped,
    decode_vector,
    flat,
    layout_of,
    protect,
    unflat,
    weight_of,
)
from edge_runtime.training.replay import SCALARS, STEPS
from tests.coordinator.conftest import SPECS, write_package
from tests.coordinator.formula import delta_of
from tests.edge_runtime.golden.generate import TASK

KEY = bytes(32)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The manifest of a tiny package."""
    folder = write_package(tmp_path_factory.mktemp("package") / "package", generate_key())
    return parse_manifest((folder / "manifest.json").read_bytes())


@pytest.fixture
def task() -> Task:
    """A task that trains all slices and the head."""
    return replace(TASK, slices=("s0", "s1", "s2"), train_head=True, steps=4, batch_size=8)


def change_of(task: Task) -> bytes:
    return encode_values(delta_of(SPECS, task, "a"))


def test_a_change_comes_back_from_its_vector(task: Task, manifest: Manifest) -> None:
    """A vector has every number of the trained tensors, in an order that device and coordinator share."""
    layout = layout_of(task, manifest)
    change = load(change_of(task))
    vector = flat(layout, change)
    assert layout.length == len(vector) == sum(array.size for array in change.values())
    back = unflat(layout, vector)
    assert set(back) == set(change)
    assert all((back[name] == change[name]).all() for name in change)


def test_scalars_take_their_steps_places_and_short_batches_count_in_full(
    task: Task, manifest: Manifest
) -> None:
    """Skipped steps are zeros; scalars of a batch of half the size count twice, as in a mean over fewer rows."""
    scalars = replace(task, report="scalars", draws=2, directions="per_example")
    layout = layout_of(scalars, manifest)
    jvps = np.arange(2 * 2 * 4, dtype=np.float32).reshape(2, 2, 4)
    head = {name: np.zeros(shape, np.float32) for name, shape in layout.tensors.items() if name != SCALARS}
    back = unflat(layout, flat(layout, {SCALARS: jvps, STEPS: np.float32([0, 3]), **head}))
    assert back[SCALARS].shape == (4, 2, 8)
    assert (back[SCALARS][[0, 3], :, :4] == 2 * jvps).all()
    assert not back[SCALARS][[1, 2]].any()
    assert back[STEPS].tolist() == [0, 1, 2, 3]


def test_without_protection_the_same_bytes_leave(task: Task, manifest: Manifest) -> None:
    """A task without protection, or with clipping by the server, changes no byte."""
    for protection in (None, Protection(clip_norm=0.1)):
        plain = replace(task, protection=protection)
        assert protect(plain, manifest, change_of(plain), 7, KEY) == change_of(plain)


def test_noise_is_added_to_what_was_clipped(task: Task, manifest: Manifest) -> None:
    """The vector has the clipped change and noise of the stated size; other keys give other noise."""
    noised = replace(task, protection=Protection(0.5, 0.01))
    layout = layout_of(noised, manifest)
    vector = decode_vector(protect(noised, manifest, change_of(noised), 7, KEY), layout)
    noise = vector - clipped(flat(layout, load(change_of(noised))), 0.5)
    assert 0.003 < noise.std() < 0.03
    other = decode_vector(protect(noised, manifest, change_of(noised), 7, bytes([1]) * 32), layout)
    assert (vector != other).any()


def test_integers_are_the_weighted_change_and_its_weight(task: Task, manifest: Manifest) -> None:
    """To be masked, a change is weighed by its share of the most examples, rounded and cut; the weight comes last."""
    masked = replace(task, protection=Protection(None, 0.0, 32, 2.0**-20, 1_000_000))
    integers = np.frombuffer(protect(masked, manifest, change_of(masked), 16, KEY), "<i4")
    vector = flat(layout_of(masked, manifest), load(change_of(masked)))
    assert integers[-1] == 500_000
    wanted = np.clip(np.rint(vector / 2 * 2.0**20), -1_000_000, 1_000_000)
    assert (integers[:-1] == wanted).all()
    assert np.abs(wanted).max() == 1_000_000 or np.abs(vector / 2).max() < 1


def test_clipped_contributions_weigh_alike(task: Task) -> None:
    """A weight of examples would tell how many rows a device has, and raise what it can change."""
    assert weight_of(replace(task, protection=Protection(1.0, 0.0, 32)), 3) == 1.0
    assert weight_of(replace(task, protection=Protection(None, 0.0, 32)), 8) == 0.25


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "one float32 tensor"),
        ({VECTOR: np.zeros(2, np.float64)}, "one float32 tensor"),
        ({VECTOR: np.zeros(2, np.float32)}, "finite numbers"),
        ({VECTOR: np.zeros(2, np.float32), "other": np.zeros(1, np.float32)}, "one float32 tensor"),
        (None, "not a safetensors file"),
    ],
)
def test_other_vectors_are_refused(task: Task, manifest: Manifest, tensors: dict | None, words: str) -> None:
    """A vector of another type, length or company is not taken."""
    data = b"junk" if tensors is None else save(tensors) if tensors else save({"x": np.zeros(1, np.float32)})
    with pytest.raises(SliceError, match=words):
        decode_vector(data, layout_of(task, manifest))
