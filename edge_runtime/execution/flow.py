"""Named values of one micro-batch on their way through the segments."""

from __future__ import annotations

from edge_runtime.engines.engine import Array

#: Name of the values that every segment passes on.
HIDDEN = "hidden"
#: Suffix of a program's input or output that is a tangent, and of one that is a cotangent.
DOT, BAR = "_dot", "_bar"
MASK, LABELS = "attention_mask", "labels"
#: Names of the values that come with a batch; segments make all others in a flow.
INPUTS = ("input_ids", MASK, LABELS)
Flow = dict[str, Array]
