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

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edge_runtime.errors import ModelError
from export.heads import OUTPUTS
from export.model import LoadedModel, is_trainable

aten = torch.ops.aten

MODEL_INPUTS = ("input_ids", "attention_mask", "labels")
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
#: Operators that only hint at memory layout, or copy.
COPIES = (aten.clone.default, aten.alias.default, aten._assert_tensor_metadata.default)


@dataclass
class SegmentGraph:
    """One segment: a graph whose every input is explicit.

    Attributes:
        name: ``embedding``, ``block_N`` or ``head``.
        graph: placeholders are, in order, ``values``, then ``slices``, then ``weights``.
        values: names of flowing values taken as input.
        outputs: names of flowing values given.
        slices: placeholder name to trainable parameter name of the model.
        weights: placeholder name to frozen parameter or buffer name of the model.
    """

    name: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    slices: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    def copied(self) -> SegmentGraph:
        """The same segment with a graph of its own; nodes keep their names."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return SegmentGraph(
            self.name, graph, list(self.values), list(self.outputs), dict(self.slices), dict(self.weights)
        )

    def module(self) -> fx.GraphModule:
        """The graph as a callable module; it owns no tensors."""
        return fx.GraphModule(torch.nn.Module(), self.graph)


@dataclass(frozen=True)
class Capture:
    """All segments in order, and the tensors they name.

    ``tensors`` has the shape and dtype of each (on the meta device); those that no model folder holds, because the
    recording made them, have their values in ``constants``.
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
    segments = tuple(_Cutter(exported, model).cut())
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


def structure_of(segment: SegmentGraph, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """A key equal for segments that can share a program: same operators, arguments, shapes."""
    index = {node: i for i, node in enumerate(segment.graph.nodes)}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", index[value])
        if isinstance(value, list | tuple):
            return tuple(plain(item) for item in value)
        return str(value)

    nodes = []
    for node in segment.graph.nodes:
        if node.op == "placeholder":
            source = segment.weights.get(node.name) or segment.slices.get(node.name)
            detail: Any = (
                (node.name, tuple(tensors[source].shape), str(tensors[source].dtype)) if source else node.name
            )
        else:
            detail = (
                str(node.target),
                plain(node.args),
                tuple((k, plain(v)) for k, v in node.kwargs.items()),
            )
        nodes.append((node.op, detail))
    return (tuple(segment.values), tuple(segment.outputs), tuple(nodes))


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


class _Cutter:
    """Assigns each node of an exported graph to a segment, then rebuilds one graph per segment."""

    def __init__(self, exported: torch.export.ExportedProgram, model: LoadedModel) -> None:
        self.graph = exported.graph
        signature = exported.graph_signature
        self.sources = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.user_inputs = dict(zip(signature.user_inputs, MODEL_INPUTS, strict=True))
        self.in_block = re.compile(rf"^{re.escape(model.blocks)}\.(\d+)(\.|$)")
        self.results = list(next(node for node in self.graph.nodes if node.op == "output").args[0])
        self.result_names = OUTPUTS[model.task]
        self.calls_of_blocks: dict[tuple[str, int], int] = {}

    def cut(self) -> list[SegmentGraph]:
        place = self._place_nodes()
        last = max(place.values())
        names = ["embedding", *(f"block_{i}" for i in range(last - 1)), "head"]
        crossing = self._name_crossing_values(place, last)
        return [self._build(i, names[i], place, crossing) for i in range(last + 1)]

    def _calls(self) -> Iterable[fx.Node]:
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target is not aten._assert_tensor_metadata.default:
                yield node

    def _from_text(self) -> set[fx.Node]:
        """Nodes whose values depend on what the text says, not only on its length and mask."""
        found: set[fx.Node] = set()
        for node in self._calls():
            looks_up = node.target is aten.embedding.default and self._reads_ids(node.args[1])
            if looks_up or any(n in found and not _is_size(n) for n in node.all_input_nodes):
                found.add(node)
        return found

    def _reads_ids(self, node: Any) -> bool:
        while isinstance(node, fx.Node) and node.op == "call_function" and node.all_input_nodes:
            if _is_size(node):
                return False
            node = node.all_input_nodes[0]
        return isinstance(node, fx.Node) and self.user_inputs.get(node.name) == "input_ids"

    def _place_nodes(self) -> dict[fx.Node, int]:
        """Segment index of every call: 0 embedding, i+1 block i, last the head."""
        own = {node: self._block_of(node) for node in self._calls()}
        count = max((i for i in own.values() if i is not None), default=-1) + 1
        if count == 0:
            raise ModelError("no operation of the captured graph belongs to a block; the model cannot be cut")
        head = count + 1
        place: dict[fx.Node, int] = {}
        for node in self._calls():
            inputs = [place[n] for n in node.all_input_nodes if n in place and not _is_size(n)]
            latest = max(inputs, default=0)
            block = own[node]
            place[node] = block + 1 if block is not None else (0 if latest == 0 else head)
            if latest > place[node]:
                raise ModelError(
                    f"operation {node.name} of block {block} needs a later block; blocks must be a chain"
                )
        # What only the head uses is computed there, not carried through every block.
        for node in reversed(list(self._calls())):
            users = [place.get(user, head) for user in node.users]
            if own[node] is None and place[node] == 0 and users and all(user == head for user in users):
                place[node] = head
        return place

    def _block_of(self, node: fx.Node) -> int | None:
        """Which call of a block the node belongs to, counted in the order of execution; a block may be called again."""
        for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
            if match := self.in_block.match(path):
                # torch.export marks the calls of a module after its first as "@1", "@2", …
                _, _, again = str(key).partition("@")
                call = (match.group(1), int(again or 0))
                return self.calls_of_blocks.setdefault(call, len(self.calls_of_blocks))
        return None

    def _name_crossing_values(self, place: dict[fx.Node, int], last: int) -> dict[fx.Node, str]:
        """Names for tensors made in one segment and used in another."""
        names: dict[fx.Node, str] = {}
        from_text = self._from_text()
        for node in self._calls():
            later = {place[user] for user in node.users if user in place} - {place[node]}
            if not later or _is_size(node):
                continue
            if place[node] == 0 and node not in from_text:
                names[node] = f"context_{sum(name.startswith('context') for name in names.values())}"
            elif later == {place[node] + 1}:
                if any(place[other] == place[node] and name == "hidden" for other, name in names.items()):
                    raise ModelError(
                        f"segment {place[node]} hands two values to the next; only one is supported"
                    )
                names[node] = "hidden"
            else:
                raise ModelError(f"value {node.name} skips segments {sorted(later)}; blocks must be a chain")
        for node, name in zip(self.results, self.result_names, strict=True):
            names[node] = name
        return names

    def _build(
        self, index: int, name: str, place: dict[fx.Node, int], crossing: dict[fx.Node, str]
    ) -> SegmentGraph:
        segment = SegmentGraph(name)
        nodes = [node for node in self._calls() if place[node] == index and not _is_size(node)]
        local = _Locals(segment)
        used = {n for node in nodes for n in node.all_input_nodes if not _is_size(n)}
        outside = [n for n in self.graph.nodes if n in used and place.get(n) != index]
        values = {
            n: self.user_inputs.get(n.name) or crossing[n] for n in outside if n.name not in self.sources
        }
        for node in sorted(values, key=lambda n: (values[n] != "hidden", values[n])):
            local.add_value(node, values[node])
        for trainable in (True, False):
            for node in (n for n in outside if n.name in self.sources):
                source = self.sources[node.name]
                if is_trainable(source) == trainable:
                    local.add_tensor(node, source, trainable, self.in_block)
        for node in nodes:
            local.copy(node)
        given = [node for node in nodes if node in crossing]
        segment.outputs = [crossing[node] for node in given]
        segment.graph.output(tuple(local.env[node] for node in given))
        segment.graph.lint()
        return segment


class _Locals:
    """Copies nodes into one segment's graph; sizes are read again from the segment's own inputs."""

    def __init__(self, segment: SegmentGraph) -> None:
        self.segment = segment
        self.graph = segment.graph
        self.env: dict[fx.Node, fx.Node] = {}
        self.sized: dict[str, tuple[fx.Node, int]] = {}

    def add_value(self, node: fx.Node, name: str) -> None:
        self._placeholder(node, name)
        self.segment.values.append(name)
        for axis, side in enumerate(node.meta["val"].shape):
            if isinstance(side, torch.SymInt):
                self.sized.setdefault(str(side.node.expr), (self.env[node], axis))

    def add_tensor(self, node: fx.Node, source: str, trainable: bool, in_block: re.Pattern[str]) -> None:
        stem = in_block.sub("", source).replace(".", "_")
        self._placeholder(node, stem)
        (self.segment.slices if trainable else self.segment.weights)[self.env[node].name] = source

    def _placeholder(self, node: fx.Node, name: str) -> None:
        self.env[node] = self.graph.placeholder(name)
        self.env[node].meta["val"] = node.meta["val"]

    def copy(self, node: fx.Node) -> None:
        if node.target in COPIES:  # dropout in evaluation mode, or a layout hint
            self.env[node] = self._local(node.args[0])
            return
        if node.target is aten.split_with_sizes.default:  # each part is cut where it is taken
            return
        if node.target is operator.getitem:
            self.env[node] = self._part(node)
            return
        if node.target is aten.view.default:  # a view may need a copy once layout hints are gone
            shape = fx.node.map_arg(node.args[1], self._local)
            self.env[node] = self.graph.call_function(
                aten.reshape.default, (self._local(node.args[0]), shape)
            )
            self.env[node].meta["val"] = node.meta["val"]
            return
        self.env[node] = self.graph.node_copy(node, self._local)

    def _part(self, node: fx.Node) -> fx.Node:
        """One part of a split, as a slice of what was split."""
        split, index = node.args[0], int(str(node.args[1]))
        if not isinstance(split, fx.Node) or split.target is not aten.split_with_sizes.default:
            raise ModelError(
                f"{self.segment.name} takes part {index} of {split}; only splits by size are supported"
            )
        source, listed, *rest = split.args
        sizes, axis = [int(str(size)) for size in listed], rest[0] if rest else 0  # type: ignore[union-attr]
        start = sum(sizes[:index])
        part = self.graph.call_function(
            aten.slice.Tensor, (self._local(source), axis, start, start + sizes[index])
        )
        part.meta["val"] = node.meta["val"]
        return part

    def _local(self, node: Any) -> fx.Node:
        if node in self.env:
            return self.env[node]
        if node.target is aten.sym_size.int:
            expression = str(node.meta["val"].node.expr)
            if expression not in self.sized:
                raise ModelError(f"size {expression} cannot be read from the inputs of {self.segment.name}")
            source, axis = self.sized[expression]
            self.env[node] = self.graph.call_function(aten.sym_size.int, (source, axis))
            self.env[node].meta["val"] = node.meta["val"]
            return self.env[node]
        if _is_size(node):
            self.env[node] = self.graph.node_copy(node, self._local)
            return self.env[node]
        raise ModelError(f"{self.segment.name} uses {node.name}, which no earlier segment hands over")


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)
