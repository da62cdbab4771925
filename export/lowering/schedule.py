"""Pass: the order of a lowered graph's nodes, chosen so that its largest live set is near its minimum.

What is alive after some nodes have run depends on which have run, not on their order. So two orders that
have run the same nodes differ only in the peak so far, and the worse can be dropped: a search over sets of
nodes, layer by layer, of which the best ``BEAM`` survive. With a beam wider than a layer has sets, the search is
exact. A node that raises no peak and leaves no more alive than before is run at once, without a choice.

Sizes depend on batch, sequence and draws; orders are compared at the ``REFERENCE`` sizes, each relative to the
best that is found for it alone. The engine keeps the order of a file only if it is told to
(docs/decisions/0011-live-sets.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, le, mul, sub

import onnx_ir as ir

from export.lowering.live_sets import Buffer, NodeMemory, evaluate, node_memory

#: (batch, sequence, draws) at which orders are compared.
REFERENCE = ((1, 128, 1), (1, 128, 4))
#: Sets of nodes kept in a layer. Four times as many changed no peak of the blocks measured.
BEAM = 48

Bytes = tuple[float, ...]


def order_for_memory(model: ir.Model, beam: int = BEAM) -> bool:
    """Put a graph's nodes into a topological order with a small largest live set.

    Args:
        model: lowered program in which every value has a shape. Its nodes are reordered in place, nothing else changes.
        beam: number of sets of nodes kept in a layer of the search.

    Returns:
        Whether the order changed. The new order is never worse than the old one: the larger of its peaks at
        the reference sizes, each over the best found there, is smaller.

    Raises:
        ValueError: a value has no shape, or a node has a graph of its own.
    """
    nodes = list(model.graph)
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for node in nodes
        for attribute in node.attributes.values()
    ):
        raise ValueError("a graph with graphs inside cannot be put into another order")
    problem = _Problem.of(model)
    given = problem.peaks(range(len(nodes)))
    found = [problem.search(_only(i, len(REFERENCE)), beam) for i in range(len(REFERENCE))]
    best = [min(peaks) for peaks in zip(given, *(problem.peaks(order) for order in found), strict=True)]
    weights = tuple(1 / peak if peak else 0.0 for peak in best)
    orders = [list(range(len(nodes))), *found]
    # Where one order is the best at every size, there is nothing to weigh.
    if all(problem.peaks(order) != tuple(best) for order in orders):
        orders.append(problem.search(weights, beam))
    # The first of equals is the given order: a graph that is as good as it gets stays as it is.
    chosen = min(orders, key=lambda order: _cost(problem.peaks(order), weights))
    if chosen == orders[0]:
        return False
    model.graph.remove(nodes)
    model.graph.extend(nodes[index] for index in chosen)
    return True


def _only(chosen: int, count: int) -> Bytes:
    return tuple(1.0 if i == chosen else 0.0 for i in range(count))


def _cost(peaks: Bytes, weights: Bytes) -> float:
    cost: float = max(map(mul, peaks, weights))
    return cost


@dataclass(frozen=True)
class _Freed:
    """A buffer from the side of a node that reads it: gone once ``users`` (a set of nodes) have all run."""

    users: int
    size: Bytes


@dataclass(frozen=True)
class _Step:
    """One node, as the search sees it; sets of nodes are integers with one bit a node."""

    needs: int
    followers: tuple[int, ...]
    made: Bytes
    workspace: Bytes
    frees: tuple[_Freed, ...]
    overwrites: _Freed | None
    can_be_free: bool  # it makes no more than it frees if nobody else reads that


@dataclass
class _State:
    """Nodes that have run, and what that took."""

    done: int
    ready: tuple[int, ...]
    live: Bytes
    peak: Bytes
    order: tuple[int, _State] | None


class _Problem:
    """Precedence and sizes of one graph."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        self.steps = steps

    @classmethod
    def of(cls, model: ir.Model) -> _Problem:
        """Read a graph."""
        memory, nodes = node_memory(model), list(model.graph)
        position = {node: index for index, node in enumerate(nodes)}
        producers = [
            {position[source] for value in node.inputs if value and (source := value.producer()) is not None}
            for node in nodes
        ]
        followers: list[list[int]] = [[] for _ in nodes]
        for index, earlier in enumerate(producers):
            for each in earlier:
                followers[each].append(index)
        return cls(
            [
                _step(memory[index], sum(1 << each for each in producers[index]), tuple(followers[index]))
                for index in range(len(nodes))
            ]
        )

    def peaks(self, order: Sequence[int]) -> Bytes:
        """Largest live set of an order at each reference size, in bytes."""
        state = self._start()
        for index in order:
            state = self._run(state, index, self._change(state, index))
        return state.peak

    def search(self, weights: Bytes, beam: int) -> list[int]:
        """An order of small largest weighted peak."""
        layers: list[dict[int, _State]] = [{} for _ in range(len(self.steps) + 1)]
        start = self._run_free(self._start())
        layers[start.done.bit_count()][start.done] = start
        for layer in layers[:-1]:
            kept = sorted(
                layer.values(), key=lambda s: (_cost(s.peak, weights), _cost(s.live, weights), s.done)
            )
            tried: dict[int, float] = {}
            for state in kept[:beam]:
                for index in state.ready:
                    done, change = state.done | 1 << index, self._change(state, index)
                    cost = _cost(tuple(map(max, state.peak, change[1])), weights)
                    # Another state of this layer may have come to the same set, no worse.
                    if tried.get(done, cost + 1) <= cost:
                        continue
                    tried[done] = cost
                    after = self._run_free(self._run(state, index, change))
                    rivals = layers[after.done.bit_count()]
                    rival = rivals.get(after.done)
                    if rival is None or cost < _cost(rival.peak, weights):
                        rivals[after.done] = after
            layer.clear()
        (last,) = layers[-1].values()
        return _order_of(last)

    def _start(self) -> _State:
        nothing = (0.0,) * len(REFERENCE)
        ready = tuple(index for index, step in enumerate(self.steps) if not step.needs)
        return _State(0, ready, nothing, nothing, None)

    def _run_free(self, state: _State) -> _State:
        """Run what costs nothing, until nothing is left that does."""
        waiting = list(state.ready)
        while waiting:
            index = waiting.pop()
            if not self.steps[index].can_be_free:
                continue
            live, during = change = self._change(state, index)
            if all(map(le, during, state.peak)) and all(map(le, live, state.live)):
                state = self._run(state, index, change)
                # What is alive is less and more may be ready, so what cost something may be free now.
                waiting = list(state.ready)
        return state

    def _run(self, state: _State, index: int, change: tuple[Bytes, Bytes]) -> _State:
        live, during = change
        done = state.done | 1 << index
        opened = tuple(f for f in self.steps[index].followers if not self.steps[f].needs & ~done)
        return _State(
            done,
            (*(other for other in state.ready if other != index), *opened),
            live,
            tuple(map(max, state.peak, during)),
            (index, state),
        )

    def _change(self, state: _State, index: int) -> tuple[Bytes, Bytes]:
        """What is alive after a node, and while it runs."""
        step = self.steps[index]
        left = ~(state.done | 1 << index)
        live = tuple(map(add, state.live, step.made))
        during = tuple(map(add, live, step.workspace))
        if step.overwrites is not None and not step.overwrites.users & left:
            during = tuple(map(sub, during, step.overwrites.size))
        for freed in step.frees:
            if not freed.users & left:
                live = tuple(map(sub, live, freed.size))
        return live, during


def _step(memory: NodeMemory, needs: int, followers: tuple[int, ...]) -> _Step:
    frees = {buffer: _freed(buffer) for buffer in memory.reads if not buffer.escapes}
    made = tuple(sum(sizes) for sizes in zip(*map(_bytes, memory.makes), strict=True))
    # What nothing reads is gone as soon as it is made.
    unread = tuple(_freed(buffer) for buffer in memory.makes if not buffer.users and not buffer.escapes)
    freed = (*frees.values(), *unread)
    made = made or (0.0,) * len(REFERENCE)
    return _Step(
        needs,
        followers,
        made,
        tuple(evaluate(memory.workspace, *size) for size in REFERENCE),
        freed,
        frees.get(memory.overwrites) if memory.overwrites is not None else None,
        all(size <= sum(each.size[i] for each in freed) for i, size in enumerate(made)),
    )


def _freed(buffer: Buffer) -> _Freed:
    return _Freed(sum(1 << user for user in buffer.users), _bytes(buffer))


def _bytes(buffer: Buffer) -> Bytes:
    return tuple(evaluate(buffer.size, *size) for size in REFERENCE)


def _order_of(state: _State) -> list[int]:
    order = []
    while state.order is not None:
        index, state = state.order
        order.append(index)
    return order[::-1]
