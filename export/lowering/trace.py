"""From a segment to its primal, entry, dual and adjoint programs, as ``torch.export`` records them.

* primal: values and slices in, values out;
* entry: the same plus tangents of the slices, except tensors that no device moves; the incoming hidden state has none;
* dual: the same plus tangents of the hidden state;
* decode: the primal program of a segment that was captured with cached keys and values, from which the next token
  comes; its tokens before are a dynamic side of their own;
* adjoint: values, slices and the cotangent ``hidden_bar`` (B, T, H) of the hidden state that the segment gave; out
  come ``hidden_bar`` of the one it took and, summed over the batch, the gradient ``X_bar`` of each slice tensor X.
  That of the head starts from the loss: it takes no cotangent, and gives the head's outputs as well.

A tangent's name is its value's with ``_dot``. Shapes: hidden (B, T, H) with hidden_dot (K, B, T, H); a slice
tensor (1, ...) with its tangent (K, B, ...), one direction per draw and example.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
import torch._dynamo.config
from torch import Tensor, nn

from edge_runtime.errors import ModelError
from export.autodiff.adjoint import AdjointInterpreter
from export.autodiff.dual import ZERO, DualInterpreter, Tangent, Zero
from export.capture.segment import SegmentGraph
from export.slices.kinds import HELD

ProgramKind = Literal["primal", "entry", "dual", "adjoint", "decode"]
#: Values that carry a tangent from segment to segment; everything else that flows is constant.
DIFFERENTIATED = ("hidden", "loss")
DRAWS, BATCH, SEQUENCE = "draws", "batch", "sequence"
#: Sides of decode programs: the number of tokens before, and with the new ones.
BEFORE, SEEN = "before", "seen"


@dataclass(frozen=True)
class TracedProgram:
    """A recorded program.

    Attributes:
        exported: recording itself.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        weights: names of the frozen tensors, which are the last inputs.
        axes: dynamic axes of each input, each under its name: DRAWS, BATCH or SEQUENCE; of a decode program BEFORE or
            SEEN, too.
    """

    exported: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    axes: dict[str, dict[int, str]]


class _Program(nn.Module):
    """Calls a segment on named inputs, with the tangents its kind takes."""

    def __init__(self, segment: SegmentGraph, kind: ProgramKind) -> None:
        super().__init__()
        slices, weights = list(segment.slices), list(segment.weights)
        carried = [name for name in segment.values if name in DIFFERENTIATED and kind == "dual"]
        # The head's own parameters are trained by their exact gradient and never carry a tangent.
        plain = kind in ("primal", "decode")
        moved = [] if plain or segment.name == "head" else moved_slices(segment)
        self.dotted = [*carried, *moved]
        self.names = [*segment.values, *slices]
        self.input_names = [*self.names, *(f"{name}_dot" for name in self.dotted), *weights]
        self.segment = segment
        self.kind = kind
        self.output_names = [
            each
            for name in segment.outputs
            for each in ((name, f"{name}_dot") if not plain and name in DIFFERENTIATED else (name,))
        ]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        named = dict(zip(self.input_names, inputs, strict=True))
        order = [*self.names, *self.segment.weights]
        primals = [named[name] for name in order]
        tangents: list[Tangent] = [named.get(f"{name}_dot", ZERO) for name in order]
        results = DualInterpreter(self.segment.module()).run_dual(primals, tangents)
        pairs = dict(zip(self.segment.outputs, results, strict=True))
        outputs = []
        for name in self.output_names:
            value, dot = pairs[name.removesuffix("_dot")]
            chosen = dot if name.endswith("_dot") else value
            if isinstance(chosen, Zero):
                raise ModelError(f"{self.segment.name}: {name} does not depend on any slice of the segment")
            outputs.append(chosen)
        return outputs


class _AdjointProgram(nn.Module):
    """Calls a segment and its vector-Jacobian product on named inputs."""

    def __init__(self, segment: SegmentGraph) -> None:
        super().__init__()
        ends = "loss" in segment.outputs
        # The head's own parameters are trained by their gradient in closed form, at the device.
        self.wanted = ["hidden", *([] if ends else moved_slices(segment))]
        self.names = [*segment.values, *segment.slices]
        self.input_names = [*self.names, *([] if ends else ["hidden_bar"]), *segment.weights]
        self.output_names = [*(segment.outputs if ends else []), *(f"{name}_bar" for name in self.wanted)]
        self.seeded = segment.outputs.index("loss" if ends else "hidden")
        self.ends = ends
        self.segment = segment

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        named = dict(zip(self.input_names, inputs, strict=True))
        order = [*self.names, *self.segment.weights]
        outputs, bars = AdjointInterpreter(self.segment.module()).run_adjoint(
            [named[name] for name in order],
            [name in self.wanted for name in order],
            {self.seeded: named.get("hidden_bar")},
        )
        by_name = dict(zip([name for name in order if name in self.wanted], bars, strict=True))
        return [*(outputs if self.ends else []), *(by_name[name] for name in self.wanted)]


def moved_slices(segment: SegmentGraph) -> list[str]:
    """Names of a segment's slice tensors that devices move; of the others there are no derivatives."""
    return [name for name, source in segment.slices.items() if source.rpartition(".")[2] not in HELD]


def trace(
    segment: SegmentGraph, kind: ProgramKind, tensors: dict[str, Tensor], position_limit: int
) -> TracedProgram:
    """Record one program with draws, batch and sequence as dynamic dimensions.

    Args:
        segment: segment to record, quantised or not.
        kind: kind of program to record.
        tensors: trainable and frozen tensors by name, for shape and dtype; they may be on the meta device.
        position_limit: longest sequence the model allows, in tokens.

    Raises:
        MissingRuleError: an operator has no tangent rule, or no adjoint rule.
    """
    if kind == "decode":
        return _trace_decoding(segment, tensors)
    program = _AdjointProgram(segment) if kind == "adjoint" else _Program(segment, kind)
    dims = {
        DRAWS: torch.export.Dim(DRAWS, min=1, max=4096),
        BATCH: torch.export.Dim(BATCH, min=1, max=4096),
        SEQUENCE: torch.export.Dim(SEQUENCE, min=2, max=position_limit),
    }
    sizes = {DRAWS: 2, BATCH: 3, SEQUENCE: 5}
    examples: list[Tensor] = []
    axes: dict[str, dict[int, str]] = {}
    for name in program.input_names:
        example, symbols = _example(name, segment, tensors, sizes)
        examples.append(example)
        axes[name] = symbols
    shapes = tuple(
        {axis: dims[symbol] for axis, symbol in axes[name].items()} for name in program.input_names
    )
    with torch.no_grad(), _without_shape_table():
        exported = torch.export.export(program, tuple(examples), dynamic_shapes=(shapes,))
    return TracedProgram(
        exported, tuple(program.input_names), tuple(program.output_names), tuple(segment.weights), axes
    )


def _trace_decoding(segment: SegmentGraph, tensors: dict[str, Tensor]) -> TracedProgram:
    """Record a decode program. That SEEN is the sum of two other sides is no condition that a side can state."""
    program = _Program(segment, "decode")
    sizes = {BATCH: 3, SEQUENCE: 7, BEFORE: 5, SEEN: 12}
    examples: list[Tensor] = []
    axes: dict[str, dict[int, str]] = {}
    for name in program.input_names:
        if name in segment.weights or name in segment.slices:
            example, axes[name] = _example(name, segment, tensors, {})
            examples.append(example)
            continue
        value = next(node for node in segment.graph.nodes if node.name == name).meta["val"]
        axes[name] = {
            axis: _side_of_decoding(name, axis, side)
            for axis, side in enumerate(value.shape)
            if isinstance(side, torch.SymInt)
        }
        shape = [
            sizes[axes[name][axis]] if axis in axes[name] else int(s) for axis, s in enumerate(value.shape)
        ]
        examples.append(torch.zeros(shape, dtype=value.dtype))
    shapes = tuple(dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in program.input_names)
    with torch.no_grad(), _without_shape_table():
        exported = torch.export.export(
            program,
            tuple(examples),
            dynamic_shapes=(shapes,),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    return TracedProgram(
        exported, tuple(program.input_names), tuple(program.output_names), tuple(segment.weights), axes
    )


def _without_shape_table() -> AbstractContextManager[None]:
    """Let torch keep no table of which shapes an operator gave: one block hardly calls an operator twice on the same
    sides, and comparing and copying them for the table took half of a recording. A whole model repeats them.
    """
    table_off: AbstractContextManager[None] = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return table_off


def _side_of_decoding(name: str, axis: int, side: torch.SymInt) -> str:
    """What a dynamic side of a value counts."""
    if axis == 0:
        return BATCH
    if "+" in str(side.node.expr):
        return SEEN
    return BEFORE if name.startswith("past_") else SEQUENCE


def _example(
    name: str, segment: SegmentGraph, tensors: dict[str, Tensor], sizes: dict[str, int]
) -> tuple[Tensor, dict[int, str]]:
    """A tensor of the right shape for an input, and which of its axes are dynamic."""
    if name in segment.weights or name in segment.slices:
        tensor = tensors[segment.weights.get(name) or segment.slices[name]]
        return torch.empty(tensor.shape, dtype=tensor.dtype), {}  # never touched, so it takes no memory
    if name.endswith("_dot"):
        base = name.removesuffix("_dot")
        value, symbols = _example(base, segment, tensors, sizes)
        if base in segment.slices:
            return torch.zeros(sizes[DRAWS], sizes[BATCH], *value.shape[1:]), {0: DRAWS, 1: BATCH}
        shifted = {axis + 1: symbol for axis, symbol in symbols.items()}
        return torch.zeros(sizes[DRAWS], *value.shape), {0: DRAWS, **shifted}
    if name == "hidden_bar":
        name = "hidden"
    value = next(node for node in segment.graph.nodes if node.name == name).meta["val"]
    symbols, shape = {}, []
    for axis, side in enumerate(value.shape):
        if isinstance(side, torch.SymInt):
            symbol = BATCH if axis == 0 else SEQUENCE
            symbols[axis] = symbol
            shape.append(sizes[symbol])
        else:
            shape.append(int(side))
    return torch.zeros(shape, dtype=value.dtype), symbols
