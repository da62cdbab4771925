"""Capture a model as one ATen graph and cut it into segments at its own block boundaries.

``torch.export`` records the whole model with dynamic batch and sequence, on tensors that have shapes but no values, so
that its size does not matter. The module path it leaves on each node tells which call of a block the node came from. A
segment is everything before the blocks (``embedding``), one call of a block, or everything after (``head``). Values
flow between segments by name:

* ``hidden``: what a segment hands to the next;
* ``context_N``: made by the embedding segment for the blocks, whatever the text says (attention masks, rotary tables);
* ``input_ids``, ``attention_mask``, ``labels``: the model's inputs;
* the head's outputs;
* ``past_mask``, ``past_key``, ``past_value``, ``key``, ``value``: where the model is recorded as it gives the next
  token, how many tokens came before, and what each block has kept and keeps of them.

Two blocks whose graphs are equal but for the tensors they use share one structure, and later one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edge_runtime.errors import ModelError
from export.capture.cut import Cutter, aten
from export.capture.segment import SegmentGraph
from export.model.generation import CacheShape, NextToken, cache_shape
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
#: What a decode program is given of the tokens before, and what each block keeps; given again under PAST.
PAST_MASK, PAST, CACHED = "past_mask", "past_", ("key", "value")
#: Prefix of constants of the recording with cached keys and values.
DECODING = "decoding."


@dataclass(frozen=True)
class Capture:
    """A recorded and cut model.

    Attributes:
        segments: all segments, in order.
        tensors: shape and dtype of every tensor that they name, on the meta device.
        constants: values of those tensors that no model folder holds, because the recording made them.
        decoding: the same segments as they give the next token from cached keys and values; empty where that was not
            asked for.
        cache_shape: what each block of these keeps of a token; None without them.
    """

    segments: tuple[SegmentGraph, ...]
    tensors: dict[str, Tensor]
    constants: dict[str, Tensor]
    decoding: tuple[SegmentGraph, ...] = ()
    cache_shape: CacheShape | None = None


def capture(model: LoadedModel, *, with_generation: bool = False) -> Capture:
    """Record the model and cut it.

    Args:
        model: model to record.
        with_generation: whether to record it a second time, as it gives the next token from cached keys and values.

    Raises:
        ModelError: the model cannot be recorded, or its blocks are not a chain.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _give_fake_values(model.module, mode)
    exported = _record(model, mode)
    segments = tuple(Cutter(exported, model).cut())
    tensors, constants = _named_tensors(exported, segments)
    if not with_generation:
        return Capture(segments, tensors, constants)
    decoder, shape = _record_decoding(model, mode)
    decoding = tuple(_cut_decoding(decoder, model))
    more, lifted = _named_tensors(decoder, decoding)
    # Both recordings number their constants from 0.
    renamed = {name: f"{DECODING}{name}" for name in lifted}
    for segment in decoding:
        segment.weights = {name: renamed.get(source, source) for name, source in segment.weights.items()}
    return Capture(
        segments,
        {**{renamed.get(name, name): tensor for name, tensor in more.items()}, **tensors},
        {**{renamed[name]: tensor for name, tensor in lifted.items()}, **constants},
        decoding,
        shape,
    )


def _named_tensors(
    exported: torch.export.ExportedProgram, segments: Sequence[SegmentGraph]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every tensor that segments name, on the meta device; and the values of those that the recording made."""
    lifted = set(exported.graph_signature.inputs_to_lifted_tensor_constants.values())
    held = {**exported.state_dict, **exported.constants}
    named = sorted(
        {source for segment in segments for source in (*segment.weights.values(), *segment.slices.values())}
    )
    return (
        {name: torch.empty(held[name].shape, dtype=held[name].dtype, device="meta") for name in named},
        {name: _value(name, held[name]) for name in named if name in lifted},
    )


def _value(name: str, tensor: Tensor) -> Tensor:
    if isinstance(tensor, FakeTensor):
        raise ModelError(f"constant {name} of the captured model lost its value; please report the model")
    return tensor.detach()


def _decompositions() -> Any:
    table = torch.export.default_decompositions()
    for kept in KEPT_WHOLE:
        table.pop(kept, None)  # type: ignore[no-untyped-call]
    return table


def _record_decoding(
    model: LoadedModel, mode: FakeTensorMode
) -> tuple[torch.export.ExportedProgram, CacheShape]:
    """The model as it gives the next token, with batch, new tokens and tokens before as dynamic sides."""
    if model.task != "causal_lm":
        raise ModelError(
            "only a causal language model gives one token after another; leave out --with-generation"
        )
    module: Any = model.module
    shape = cache_shape(module.encoder, module.arguments, mode)
    batch = torch.export.Dim("batch", min=1, max=4096)
    new = torch.export.Dim("sequence", min=1, max=model.position_limit)
    before = torch.export.Dim("past", min=0, max=model.position_limit)
    blocks = len(module.get_submodule(model.blocks))
    with mode:
        ids, mask = torch.ones(3, 7, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)
        past = [
            torch.zeros(3, shape.heads, 5, size)
            for _ in range(blocks)
            for size in (shape.key_size, shape.value_size)
        ]
    try:
        exported = torch.export.export(
            NextToken(module.encoder, module.arguments).eval(),
            (ids, mask, *past),
            dynamic_shapes=(
                {0: batch, 1: new},
                {0: batch, 1: before},
                tuple({0: batch, 2: before} for _ in past),
            ),
        )
    except Exception as error:  # the model's own code runs here, and may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model.architecture} cannot be captured with cached keys and values, which --with-generation needs: "
            f"{reason}"
        ) from error
    return exported.run_decompositions(_decompositions()), shape


def _cut_decoding(exported: torch.export.ExportedProgram, model: LoadedModel) -> list[SegmentGraph]:
    blocks = (len(exported.graph_signature.user_inputs) - 2) // 2
    return Cutter(
        exported,
        model,
        ("input_ids", PAST_MASK, *(PAST + name for name in CACHED * blocks)),
        ("logits", *CACHED * blocks),
    ).cut()


def _record(model: LoadedModel, mode: FakeTensorMode) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    sequence = torch.export.Dim("sequence", min=2, max=model.position_limit)
    text = {0: batch, 1: sequence}
    per_token = model.task == "causal_lm"
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
    decomposed: torch.export.ExportedProgram = exported.run_decompositions(_decompositions())
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
