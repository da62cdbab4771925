"""From what a sweep gives to the logits of the labels: the one place that knows how a head is used."""

from __future__ import annotations

from edge_runtime.errors import PackageError
from edge_runtime.execution.executor import Sweep
from edge_runtime.package.slices import FloatArray


def class_logits(sweep: Sweep) -> FloatArray:
    """(B, C) logits of the labels of a sweep's texts.

    Raises:
        PackageError: the package's programs do not give them.
    """
    if sweep.logits is None:
        raise PackageError("the package's head gives no logits; export it again")
    return sweep.logits
