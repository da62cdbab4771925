"""The ExecuTorch side of a package: one ``.pte`` beside each program's ``.onnx``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from edge_runtime.memory.plan import preferred_micro_batch
from edge_runtime.package.manifest import Axis, Undelegated, Variant
from export.lowering.executorch import lower_executorch
from export.lowering.trace import TracedProgram
from export.quantisation.quantise import frozen_embedding

#: Draws that a program is planned for; more are run in several sweeps.
MOST_DRAWS = 4
#: More examples than any step has: the bound then depends on the sequence alone.
_MANY = 1 << 30


def bounds_for(sequence_limit: int) -> dict[Axis, int]:
    """The sizes that memory is planned for: what a device prefers to run at a time, at the longest sequence."""
    return {
        "draws": MOST_DRAWS,
        "batch": preferred_micro_batch(_MANY, sequence_limit),
        "sequence": sequence_limit,
    }


def write_executorch(folder: Path, name: str, traced: TracedProgram, sequence_limit: int) -> Variant:
    """Lower a program to ``programs/NAME.pte`` and describe it.

    Args:
        folder: folder of the package.
        name: name of the program.
        traced: recorded program; left as it is.
        sequence_limit: longest sequence of the package, in tokens.

    Raises:
        ModelError: ExecuTorch cannot lower the program.
    """
    bounds = bounds_for(sequence_limit)
    lowered = lower_executorch(traced, bounds)
    file = f"programs/{name}.pte"
    (folder / file).write_bytes(lowered.buffer)
    frozen = {*traced.weights, *(each for each in lowered.inputs if each not in traced.inputs)}
    return Variant(
        file=file,
        fed=tuple(each for each in lowered.inputs if each in frozen),
        gathered=dict(_gathered_rows(traced)),
        planned_bytes=lowered.planned_bytes,
        bounds=bounds,
        undelegated=tuple(Undelegated(*each) for each in lowered.undelegated),
    )


def _gathered_rows(traced: TracedProgram) -> Iterator[tuple[str, str]]:
    """Tables of which a program reads only the rows that one of its inputs names: (table, input)."""
    graph = traced.exported.graph
    order = (node for node in graph.nodes if node.name in traced.exported.graph_signature.user_inputs)
    names = dict(zip(order, traced.inputs, strict=True))
    for node in graph.nodes:
        if node.target is frozen_embedding:
            tables, rows = node.args[:2], node.args[2]
        elif node.target is torch.ops.aten.embedding.default:
            tables, rows = node.args[:1], node.args[1]
        else:
            continue
        for table in tables:
            if table in names and rows in names and len(table.users) == 1:
                yield names[table], names[rows]
