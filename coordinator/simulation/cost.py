"""What a task costs a device, in passes of one example through the model: the unit in which arms are compared."""

from __future__ import annotations

from edge_runtime.messages import Task

#: Backpropagation runs the model forwards, computes each segment again on the way back, and a backward of about two.
BACKPROP_PASSES = 4


def forward_passes_per_example(task: Task) -> int:
    """Passes of one example through the model for one local step.

    Forward mode with K draws runs the values and K tangents: 1 + K. Backpropagation counts
    :data:`BACKPROP_PASSES`. The head alone needs the values: 1.
    """
    if not task.slices:
        return 1
    return BACKPROP_PASSES if task.update == "backprop" else 1 + task.draws
