"""Exits of a step: the block behind which it leaves the model, one of those that a device can reach.

In sorted fine-tuning sub-models of the first n blocks share what follows them (SoFT, "Sorted LLaMA", Valipour et al.
2024, EACL findings; SortedNet). There the loss is summed over the exits, or one is drawn for a step; the details were
not at hand, and drawing one is the stand-in taken here, for it makes a step cheaper where a sum would not. All exits
share the head, which reads the pooled output of the exit's block. A device and whoever replays its scalars draw the
same exit: uniform, from word 0 of (step, 0, 0) under the key of seed, round, slot and ``"exit/"``
(:mod:`edge_runtime.training.tangents`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.package.manifest import SliceSpec
from edge_runtime.protocol.messages import Task
from edge_runtime.training.tangents import philox_key, random_words


def step_exit(task: Task, number: int) -> int | None:
    """The block behind which a step leaves the model; None where the task has no exits."""
    if not task.exits:
        return None
    drawn = random_words(philox_key(task.seed, task.round, task.slot, "exit/"), number, 0, 0, 1)[0]
    return task.exits[int(drawn % np.uint64(len(task.exits)))]


def within(task: Task, specs: Sequence[SliceSpec], number: int) -> list[SliceSpec]:
    """Those of the slices that a step reaches, and a head: what its directions are drawn for."""
    leave = step_exit(task, number)
    return [spec for spec in specs if leave is None or spec.kind == "head" or spec.segment <= leave]
