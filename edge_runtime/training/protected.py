"""A contribution as one vector of fixed length, clipped, with noise or in integers, as a task's ``protection`` says.

Whatever a task's result holds becomes a vector of numbers whose length hangs on the task and its package alone:

* ``report = "weights"``: the change of the trained tensors, in order;
* ``report = "scalars"``: the directional derivatives of all steps, zeros for skipped ones, scaled up where a batch has
  fewer rows than the task's, and the change of the head;
* ``head = "closed_form"``: the upper triangle of the Gram matrix, the sums by class, and the counts, scaled so that a
  row adds at most 1 to the norm of the vector. With rows of squared length q: the Gram by 1/2q, the sums by 1/2√q, the
  counts by 1/2; a row's own vector then has a squared norm of at most (1 + 2 + 1)/4.

The Euclidean norm is clipped (McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", arXiv
1710.06963, section 2), so it bounds what one device can change. Noise is Gaussian and independent (Dwork & Roth 2014,
section 3.5). Integers are for sums of which nobody can see the parts (:mod:`edge_runtime.masking`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_runtime.errors import SliceError
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.slices import Values, shapes
from edge_runtime.protocol.messages import PER_EXAMPLE, Task
from edge_runtime.training.feature_sums import FeatureSums, SumsForm, decode_sums, form_of
from edge_runtime.training.gaussian import gaussian, on_grid
from edge_runtime.training.replay import SCALARS, STEPS
from edge_runtime.training.trainable import estimated_slices, exact_heads

DoubleArray = NDArray[np.float64]
#: Name of the one tensor of a contribution that travels as a vector.
VECTOR = "vector"


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a contribution stands in its vector.

    Attributes:
        tensors: shape of each by flat name, in order; of sums nothing.
        form: what sums are of; None of a contribution without sums.
    """

    tensors: Mapping[str, tuple[int, ...]]
    form: SumsForm | None = None

    @property
    def length(self) -> int:
        """Length of the vector."""
        if self.form is None:
            return sum(math.prod(shape) for shape in self.tensors.values())
        width, labels = self.form.width, self.form.labels
        return width * (width + 1) // 2 + width * (1 + labels) + labels


def layout_of(task: Task, manifest: Manifest) -> Layout:
    """The layout of a task's contribution.

    Args:
        task: task of the contribution.
        manifest: manifest of its package, as the run sees it.
    """
    if task.head == "closed_form":
        return Layout({}, form_of(task, manifest))
    heads = shapes(exact_heads(task, manifest.slices))
    if task.report == "scalars":
        batch = task.batch_size if task.directions in PER_EXAMPLE else 1
        moved = {SCALARS: (task.steps, task.draws, batch)} if task.slices or not heads else {}
        return Layout({**moved, **heads})
    return Layout({**shapes(estimated_slices(task, manifest.slices)), **heads})


def flat(layout: Layout, change: Mapping[str, NDArray[Any]]) -> DoubleArray:
    """A change as a vector.

    Args:
        layout: layout of the contribution, which has no sums.
        change: what was trained, by flat name; scalars of steps that were not applied are missing.
    """
    vector = np.zeros(layout.length)
    start = 0
    for name, shape in layout.tensors.items():
        part = vector[start : start + math.prod(shape)].reshape(shape)
        start += part.size
        if name != SCALARS:
            part[...] = change[name]
        elif SCALARS in change:
            rows = change[SCALARS].shape[2]
            part[change[STEPS].astype(np.int64), :, :rows] = change[SCALARS] * (shape[2] / rows)
    return vector


def flat_sums(form: SumsForm, sums: FeatureSums) -> DoubleArray:
    """Sums as a vector, scaled as the module's docstring says."""
    vector = np.empty(Layout({}, form).length)
    start = 0
    for row in range(form.width):
        end = start + form.width - row
        vector[start:end] = sums.gram[row, row:] / (2 * form.square)
        start = end
    vector[start : -form.labels] = sums.linear.ravel() / (2 * math.sqrt(form.square))
    vector[-form.labels :] = sums.counts / 2
    return vector


def unflat(layout: Layout, vector: DoubleArray) -> Values:
    """The tensors of a vector, float32; scalars with the numbers of all steps."""
    values: Values = {}
    start = 0
    for name, shape in layout.tensors.items():
        size = math.prod(shape)
        values[name] = vector[start : start + size].reshape(shape).astype(np.float32)
        start += size
    if SCALARS in values:
        values[STEPS] = np.arange(len(values[SCALARS]), dtype=np.float32)
    return values


def unflat_sums(form: SumsForm, vector: DoubleArray) -> FeatureSums:
    """The sums of a vector. With noise in them they may be of no rows that could be: counts need not be whole."""
    width, labels = form.width, form.labels
    packed, linear, counts = np.split(
        vector, [width * (width + 1) // 2, width * (width + 1) // 2 + width * (1 + labels)]
    )
    gram = np.zeros((width, width))
    gram[np.triu_indices(width)] = packed * (2 * form.square)
    gram = gram + np.triu(gram, 1).T
    counts = counts * 2
    return FeatureSums(
        max(0, round(float(counts.sum()))),
        gram,
        linear.reshape(width, 1 + labels) * (2 * math.sqrt(form.square)),
        counts,
    )


def clipped(vector: DoubleArray, clip_norm: float | None) -> DoubleArray:
    """A vector scaled down to the norm, if it is longer; one that is not finite is nothing."""
    if not np.isfinite(vector).all():
        return np.zeros_like(vector)
    norm = float(np.sqrt((vector * vector).sum()))
    if clip_norm is None or norm <= clip_norm:
        return vector
    scaled: DoubleArray = vector * (clip_norm / norm)
    return scaled


def protect(task: Task, manifest: Manifest, change: bytes, examples: int, noise_key: bytes) -> bytes:
    """What leaves the device in place of a change, or what is masked before it does.

    Args:
        task: task of the change.
        manifest: manifest of its package, as the run sees it.
        change: safetensors bytes of the change, as they would have been sent.
        examples: number of examples behind it.
        noise_key: secret key of the noise.

    Returns:
        The same bytes if nothing is to be done here. With noise alone, a safetensors file with one float32 tensor. To
        be masked: little-endian integers of ``masked_bits``, two's complement, of which the last is the weight; of
        sums there is none.
    """
    protection = task.protection
    if protection is None or not protection.hides:
        return change
    layout = layout_of(task, manifest)
    if layout.form is not None:
        vector = np.zeros(layout.length)
        if change:
            vector = flat_sums(layout.form, decode_sums(change, layout.form))
    else:
        vector = flat(layout, load(change))
    vector = clipped(vector, protection.clip_norm)
    if protection.noise_std:
        noise = gaussian(noise_key, task.task_id, len(vector), protection.noise_std)
        vector = on_grid(vector + noise, protection.noise_std)
    if not protection.masked_bits:
        return bytes(save({VECTOR: vector.astype(np.float32)}))
    share = weight_of(task, examples)
    integers = np.rint(vector * share / protection.quantum)
    integers = np.clip(integers, -protection.largest, protection.largest).astype(np.int64)
    if layout.form is None:
        integers = np.append(integers, round(share * protection.largest))
    return integers.astype(f"<i{protection.masked_bits // 8}").tobytes()


def weight_of(task: Task, examples: int) -> float:
    """What a masked contribution counts, 0 to 1: its share of the most examples, or the same for all if clipped."""
    if task.head == "closed_form" or (task.protection is not None and task.protection.clip_norm is not None):
        return 1.0
    return min(1.0, examples / (task.steps * task.batch_size))


def decode_vector(data: bytes, layout: Layout) -> DoubleArray:
    """Parse and check a contribution that travels as a vector.

    Raises:
        SliceError: it is not one finite float32 vector of the layout's length.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SliceError(f"the vector is not a safetensors file: {error}") from error
    vector = tensors.get(VECTOR)
    if set(tensors) != {VECTOR} or vector is None or vector.dtype != np.float32:
        raise SliceError(f"a contribution with noise is one float32 tensor called {VECTOR}")
    if vector.shape != (layout.length,) or not np.isfinite(vector).all():
        raise SliceError(f"{VECTOR} must hold {layout.length} finite numbers")
    return np.asarray(vector, np.float64)
