"""Capture a model as one ATen graph and cut it into segments at its own block boundaries.

``torch.export`` records the whole model with dynamic batch and sequence, on tensors that have shapes but no values, so
that its size does not matter. The module path it leaves on each node tells which call of a block the node came from. A
segment is everything before the blocks (``embedding``), one call of a block, or everything after (``head``). Values
flow between segments by name:

* ``hidden``: what a segment hands to the next;
* ``context_N``: made by the embedding segment for the blocks, whatever the text says (attention masks, rotary tables);
* ``input_ids``, ``attention_mask``, ``labels``: the model's inputs;
* the head's outputs.

Two blocks whose graphs are equal but for the tensors they use share one structure, and later one program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edge_runtime.errors import ModelError
from export.capture.cut import Cutter, aten
from export.capture.segment import SegmentGraph
from export.model.load import LoadedModel

#: Composite operators kept whole: their tangents have closed forms that reuse the primal.
KEPT_WHOLE = (
    aten.linear.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.gelu.default,
    aten.silu.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.logsumexp.default,
    aten.matmul.default,
)


@dataclass(frozen=True)
class Capture:
    """A recorded and cut model.

    Attributes:
        segments: all segments, in order.
        tensors: shape and dtype of every tensor that they name, on the meta device.
        constants: values of those tensors that no model folder holds, because the recording made them.
    """

    segments: tuple[SegmentGraph, ...]
    tensors: dict[str, Tensor]
    constants: dict[str, Tensor]


def capture(model: LoadedModel) -> Capture:
    """Record the model and cut it.

    Raises:
        ModelError: the model cannot be recorded, or its blocks are not a chain.
    """
    exported = _record(model)
    segments = tuple(Cutter(exported, model).cut())
    lifted = set(exported.graph_signature.inputs_to_lifted_tensor_constants.values())
    held = {**exported.state_dict, **exported.constants}
    named = {
        source for segment in segments for source in (*segment.weights.values(), *segment.slices.values())
    }
    return Capture(
        segments,
        {
            name: torch.empty(held[name].shape, dtype=held[name].dtype, device="meta")
            for name in sorted(named)
        },
        {name: _value(name, held[name]) for name in sorted(named & lifted)},
    )


def _value(name: str, tensor: Tensor) -> Tensor:
    if isinstance(tensor, FakeTensor):
        raise ModelError(f"constant {name} of the captured model lost its value; please report the model")
    return tensor.detach()


def _record(model: LoadedModel) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    sequence = torch.export.Dim("sequence", min=2, max=model.position_limit)
    text = {0: batch, 1: sequence}
    per_token = model.task == "causal_lm"
    table = torch.export.default_decompositions()
    for kept in KEPT_WHOLE:
        table.pop(kept, None)  # type: ignore[no-untyped-call]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _give_fake_values(model.module, mode)
    with mode:
        ids, mask = torch.ones(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.long)
        labels = torch.zeros((3, 7) if per_token else (3,), dtype=torch.long)
    try:
        exported = torch.export.export(
            model.module,
            (ids, mask, labels),
            dynamic_shapes=(text, text, text if per_token else {0: batch}),
        )
    except ModelError:
        raise
    except Exception as error:  # the model's own code runs here, and may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{model.architecture} cannot be captured by torch.export: {reason}") from error
    decomposed: torch.export.ExportedProgram = exported.run_decompositions(table)
    return decomposed


def _give_fake_values(module: nn.Module, mode: FakeTensorMode) -> None:
    """Tensors without values become fake ones, which torch.export can trace; tied ones stay tied."""
    made: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for table in tables:
            for name, value in table.items():
                if value is None or not value.is_meta:
                    continue
                if value not in made:
                    with mode:
                        fake = torch.empty(value.shape, dtype=value.dtype)
                        is_parameter = isinstance(value, nn.Parameter)
                        made[value] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
                table[name] = made[value]
