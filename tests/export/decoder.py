"""One decoder block of the Llama kind as a segment: captured alone, to differentiate it in float64."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaModel

from export.capture.record import KEPT_WHOLE
from export.capture.segment import SegmentGraph

aten = torch.ops.aten
HIDDEN, INNER, HEADS, GROUPS = 32, 48, 4, 2
#: Values of the segment, in order: hidden state, mask, and the tables of the rotary embedding.
VALUES = ("hidden", "context_0", "context_1", "context_2")


class _Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        result = self.layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))
        return result[0] if isinstance(result, tuple) else result


def block() -> tuple[_Block, LlamaModel]:
    """A random decoder layer with grouped-query attention, and the model it is part of."""
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=20,
        attn_implementation="eager",
        initializer_range=0.2,
    )
    model = LlamaModel(config).eval()
    return _Block(model.layers[0]), model


def inputs(model: LlamaModel, rows: int, tokens: int) -> tuple[Tensor, ...]:
    """Random hidden state, a causal mask whose first row is padded in front, and the rotary tables."""
    hidden = torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(4))
    mask = torch.full((rows, 1, tokens, tokens), -1e4).triu(1)
    mask[0, :, 1:, 0] = -1e4
    cos, sin = model.rotary_emb(hidden, torch.arange(tokens).expand(rows, tokens))
    return hidden, mask, cos, sin


def segment() -> tuple[SegmentGraph, dict[str, Tensor]]:
    """The block as ``export.capture.record`` would cut it, and its tensors."""
    module, model = block()
    batch, sequence = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("sequence", min=2, max=64)
    rotary = {0: batch, 1: sequence}
    shapes = (rotary, {0: batch, 2: sequence, 3: sequence}, rotary, rotary)
    table = torch.export.default_decompositions()
    for operator in KEPT_WHOLE:
        table.pop(operator, None)
    exported = torch.export.export(module, inputs(model, 3, 5), dynamic_shapes=shapes).run_decompositions(
        table
    )
    return _as_segment(exported), dict(exported.state_dict)


def _as_segment(exported: torch.export.ExportedProgram) -> SegmentGraph:
    made = SegmentGraph("block_0", values=list(VALUES), outputs=["hidden"])
    copies: dict[fx.Node, fx.Node] = {}
    names = dict(zip(exported.graph_signature.user_inputs, VALUES, strict=True))
    sources = exported.graph_signature.inputs_to_parameters
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for node in sorted(placeholders, key=lambda node: node.name not in names):
        copies[node] = made.graph.placeholder(names.get(node.name, node.name))
        copies[node].meta["val"] = node.meta["val"]
        if node.name in sources:
            made.weights[copies[node].name] = sources[node.name]
    for node in exported.graph.nodes:
        if node.op != "call_function" or node.target is aten._assert_tensor_metadata.default:
            continue
        if node.target is aten.clone.default:
            copies[node] = copies[node.args[0]]
            continue
        copies[node] = made.graph.node_copy(node, copies.__getitem__)
        if node.target is aten.view.default:
            copies[node].target = aten.reshape.default
    (result,) = next(node for node in exported.graph.nodes if node.op == "output").args[0]
    made.graph.output((copies[result],))
    made.graph.lint()
    return made
