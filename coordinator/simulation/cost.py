"""What a task costs a device, in passes of one example through the model: the unit in which arms are compared."""

from __future__ import annotations

from statistics import fmean

from edge_runtime.memory.plan import begun_shares
from edge_runtime.package.manifest import Manifest
from edge_runtime.protocol.messages import ONE_SLICE, Task
from edge_runtime.training.methods import measures_line

#: Backpropagation runs the model forwards, runs each segment again on the way back, and takes about two passes there.
BACKPROP_PASSES = 4


def forward_passes_per_example(task: Task, manifest: Manifest) -> float:
    """Passes of one example through the model for one local step; a pass to an exit counts by the blocks before it."""
    share = fmean(task.exits) / (len(manifest.segments) - 2) if task.exits else 1.0
    return share * _passes(task, manifest)


def _passes(task: Task, manifest: Manifest) -> float:
    """Passes through as much of the model as runs.

    Forward mode with K draws runs the values and K tangents: 1 + K. Where each draw moves one slice alone, it is not
    run in blocks before that slice, and counts by the blocks that are left of those from the first trained slice on.
    Backpropagation counts :data:`BACKPROP_PASSES`. The head alone needs the values: 1. Zero order takes 2K passes for
    central differences, and one at the values themselves where the head's exact gradient is wanted; 1 + K for forward
    ones. Where the loss is measured along the server's last step, that is one tangent more.
    """
    perturbed_head = task.train_head and task.head == "perturbed"
    if not task.slices and not (perturbed_head and task.update == "zero_order"):
        return 1
    if task.update == "backprop":
        return BACKPROP_PASSES
    line = int(measures_line(task))
    if task.update == "forward" and task.directions in ONE_SLICE:
        heads = (manifest.head.name,) if perturbed_head and manifest.head is not None else ()
        shares = begun_shares(manifest, (*task.slices, *heads))
        return 1 + line + task.draws * (fmean(shares.values()) if shares else 1)
    if task.update == "forward":
        return 1 + line + task.draws
    if task.difference == "forward":
        return 1 + task.draws
    return 2 * task.draws + (task.train_head and task.head == "exact")
