"""Cut a recorded model into segments at the boundaries of its own blocks."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from edge_runtime.errors import ModelError
from export.capture.segment import SegmentGraph
from export.model.heads import OUTPUTS
from export.model.load import LoadedModel, is_trainable

aten = torch.ops.aten
MODEL_INPUTS = ("input_ids", "attention_mask", "labels")
#: How torch.export calls the constants of a model's code.
CONSTANT = re.compile(r"(^|\.)lifted_tensor_\d+$")
#: Operators that only hint at memory layout, or copy.
COPIES = (aten.clone.default, aten.alias.default, aten._assert_tensor_metadata.default)


class Cutter:
    """Assigns each node of an exported graph to a segment, then rebuilds one graph per segment.

    Args:
        exported: recorded model.
        model: model that was recorded.
        inputs: name of each of its inputs; the inputs of a block may be called alike in every block.
        results: name of each of its results, likewise; None takes those of the model's task.
    """

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        model: LoadedModel,
        inputs: Sequence[str] = MODEL_INPUTS,
        results: Sequence[str] | None = None,
    ) -> None:
        self.graph = exported.graph
        signature = exported.graph_signature
        self.sources = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.user_inputs = dict(zip(signature.user_inputs, inputs, strict=True))
        self.in_block = re.compile(rf"^{re.escape(model.blocks)}\.(\d+)(\.|$)")
        self.results = list(next(node for node in self.graph.nodes if node.op == "output").args[0])
        self.result_names = OUTPUTS[model.task] if results is None else results
        self.calls_of_blocks: dict[tuple[str, int], int] = {}

    def cut(self) -> list[SegmentGraph]:
        """One graph a segment, in order: embedding, every call of a block, head.

        Raises:
            ModelError: no operation belongs to a block, or the blocks are not a chain.
        """
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
        self.constants = 0

    def add_value(self, node: fx.Node, name: str) -> None:
        self._placeholder(node, name)
        self.segment.values.append(name)
        for axis, side in enumerate(node.meta["val"].shape):
            if isinstance(side, torch.SymInt):
                self.sized.setdefault(str(side.node.expr), (self.env[node], axis))

    def add_tensor(self, node: fx.Node, source: str, trainable: bool, in_block: re.Pattern[str]) -> None:
        if CONSTANT.search(source):
            # The recording numbers them through the whole model; equal blocks shall have equal names.
            stem = f"constant_{self.constants}"
            self.constants += 1
        else:
            stem = in_block.sub("", source).replace(".", "_")
        self._placeholder(node, stem)
        (self.segment.slices if trainable else self.segment.weights)[self.env[node].name] = source

    def _placeholder(self, node: fx.Node, name: str) -> None:
        self.env[node] = self.graph.placeholder(name)
        self.env[node].meta["val"] = node.meta["val"]

    def copy(self, node: fx.Node) -> None:
        if node.target in COPIES:  # dropout in evaluation mode, or a layout hint
            self.env[node] = self._local(node.args[0])
        elif node.target is aten.split_with_sizes.default:  # each part is cut where it is taken
            pass
        elif node.users and all(_repeated_after_joining(user) is not None for user in node.users):
            pass  # joined once it is repeated
        else:
            self.env[node] = self._copied(node)

    def _copied(self, node: fx.Node) -> fx.Node:
        """The node, in the form that has rules."""
        if node.target is operator.getitem:
            return self._part(node)
        if (whole := _repeated_after_joining(node)) is not None:
            return self._expanded_before_joining(node, whole)
        if node.target is aten.view.default:  # a view may need a copy once layout hints are gone
            shape = fx.node.map_arg(_shape_for_each_example(node), self._local)
            copy = self.graph.call_function(aten.reshape.default, (self._local(node.args[0]), shape))
        elif node.target is aten.bmm.default:  # the same product
            copy = self.graph.call_function(aten.matmul.default, tuple(map(self._local, node.args)))
        else:
            return self.graph.node_copy(node, self._local)
        copy.meta["val"] = node.meta["val"]
        return copy

    def _expanded_before_joining(self, node: fx.Node, whole: fx.Node) -> fx.Node:
        """A repetition of what is the same for all examples, made while examples still have an axis of their own.

        A slice's tangent differs by example, and can be expanded no more once examples and heads are one axis.
        """
        repeats: Any = fx.node.map_arg(node.args[1], self._local)
        sides = list(whole.meta["val"].shape[1:])
        expanded = self.graph.call_function(aten.expand.default, (self._local(whole), [repeats[0], *sides]))
        expanded.meta["val"] = whole.meta["val"].expand(node.meta["val"].shape[0] // sides[0], *sides)
        joined = self.graph.call_function(aten.reshape.default, (expanded, [-1, *sides[1:]]))
        joined.meta["val"] = node.meta["val"]
        return joined

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


def _shape_for_each_example(node: fx.Node) -> Any:
    """The shape of a view; one of (1, ...) to (1, ...) says -1 for the 1, so that it fits a tangent of each example."""
    source, sides = node.args[0].meta["val"].shape, list(node.meta["val"].shape)  # type: ignore[union-attr]
    static = all(isinstance(side, int) for side in (source[0], *sides))
    return [-1, *sides[1:]] if static and source[0] == sides[0] == 1 else node.args[1]


def _repeated_after_joining(node: fx.Node) -> fx.Node | None:
    """What a node repeats, if that is (1, heads, ...) joined to (heads, ...) and repeated along its first axis."""
    if node.target is not aten.repeat.default:
        return None
    join, repeats = node.args
    if not isinstance(join, fx.Node) or join.target is not aten.view.default:
        return None
    whole = join.args[0]
    if not isinstance(whole, fx.Node) or not isinstance(repeats, list | tuple):
        return None
    sides = list(join.meta["val"].shape)
    along_first = all(isinstance(times, int) and times == 1 for times in repeats[1:])
    static = all(isinstance(side, int) for side in sides)
    joins = static and list(whole.meta["val"].shape) == [1, *sides] and len(repeats) == len(sides)
    return whole if joins and along_first else None


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)
