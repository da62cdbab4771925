"""Sketches averaged as they are, and changes found again in their mean: ``report = "sketch"``.

A sketch is linear in what it is of (:mod:`edge_runtime.training.sketch`), so the mean of the devices' sketches is
that of their changes' mean. One pursuit for each slice and round then finds its ``sketch_entries`` largest numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from coordinator.aggregation.server_optimizers import DoubleArray
from coordinator.config import RunConfig
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import key, shapes
from edge_runtime.training.sketch import SKETCH, sketch_of
from edge_runtime.training.trainable import trained_part


def found_again(
    deltas: Mapping[str, DoubleArray], specs: Iterable[SliceSpec], config: RunConfig
) -> dict[str, DoubleArray]:
    """Mean deltas of tensors, of those of their slices' sketches.

    Args:
        deltas: mean deltas by flat name, with a slice's sketch in place of its tensors.
        specs: all slices of the package.
        config: configuration of the run.

    Returns:
        float64 deltas by flat name; what a sketch does not stand for is zero.
    """
    sketch, result = sketch_of(config), dict(deltas)
    for spec in specs:
        mean = result.pop(key(spec.name, SKETCH), None)
        if mean is None or sketch is None:
            continue
        part = spec if spec.kind == "head" else trained_part(spec, config.lora_aggregation == "frozen_a")
        flat, begin = sketch.found(mean, part.dimensions), 0
        for name, shape in shapes([part]).items():
            size = int(np.prod(shape))
            result[name] = flat[begin : begin + size].reshape(shape)
            begin += size
    return result
