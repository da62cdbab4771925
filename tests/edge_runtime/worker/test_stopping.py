"""Signals that tell a worker to stop are noted within the block, and do what they did before afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from edge_runtime.worker.stopping import told_to_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted(number: signal.Signals) -> None:
    """The process lives on, and the function says that the signal came."""
    before = signal.getsignal(number)
    with told_to_stop() as told:
        assert not told()
        os.kill(os.getpid(), number)
        assert told()
    assert signal.getsignal(number) is before
