"""Logits of the labels, whoever asks."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.errors import PackageError
from edge_runtime.execution.class_logits import class_logits
from edge_runtime.execution.executor import Sweep


def test_a_linear_head_gives_its_logits() -> None:
    """They are the sweep's own; a package without them says what to do."""
    logits = np.array([[1.0, 2.0]], np.float32)
    assert class_logits(Sweep(np.zeros(1, np.float32), None, logits)) is logits
    with pytest.raises(PackageError, match="export it again"):
        class_logits(Sweep(np.zeros(1, np.float32), None))
