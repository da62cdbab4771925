"""Outputs of the segments before a task's first trained slice, kept in memory over tasks, rounds and arms.

Within a task nothing changes them. Over tasks, slices in those segments may have moved, so entries belong to a
*context*: package, first trained segment, and a digest of the slice values before it. Where a run leaves those slices
alone (the head by itself, slices of upper blocks only), the context stays and every row is computed once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

from edge_runtime.engines.engine import Array
from edge_runtime.execution.prefix_cache import Example


class KeptPrefixes:
    """Arrays by context and example, at most ``limit_bytes``.

    When it is full, contexts that were not used for longest go first; within the present one nothing is dropped, so
    that walking through more rows than fit does not push out every one before it comes again.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._contexts: OrderedDict[Hashable, dict[Example, dict[str, Array]]] = OrderedDict()
        self.hits = self.misses = 0

    def enter(self, context: Hashable) -> dict[Example, dict[str, Array]]:
        """The entries of a context, which is now the present one."""
        entries = self._contexts.setdefault(context, {})
        self._contexts.move_to_end(context)
        return entries

    def make_room(self, size: int) -> bool:
        """Forget other contexts until ``size`` more bytes fit; whether they do."""
        while self._used_bytes + size > self._limit_bytes and len(self._contexts) > 1:
            _, oldest = self._contexts.popitem(last=False)
            self._used_bytes -= sum(array.nbytes for arrays in oldest.values() for array in arrays.values())
        if self._used_bytes + size > self._limit_bytes:
            return False
        self._used_bytes += size
        return True


class DevicePrefixes:
    """The same as one executor sees it: by the rows of the device whose task it runs.

    :meth:`turn_to` must be called before each task.
    """

    def __init__(self, kept: KeptPrefixes) -> None:
        self._kept = kept
        self._entries: dict[Example, dict[str, Array]] = {}
        self._rows: Sequence[int] = ()

    def turn_to(self, context: Hashable, rows: Sequence[int]) -> None:
        """From now on, row ``i`` is ``rows[i]`` of the training file, in this context."""
        self._entries, self._rows = self._kept.enter(context), rows

    def load(self, example: Example) -> dict[str, Array] | None:
        """See :class:`edge_runtime.execution.prefix_cache.ExampleStore`."""
        row, tokens = example
        arrays = self._entries.get((self._rows[row], tokens))
        if arrays is None:
            self._kept.misses += 1
        else:
            self._kept.hits += 1
        return arrays

    def store(self, example: Example, arrays: Mapping[str, Array]) -> None:
        """See :class:`edge_runtime.execution.prefix_cache.ExampleStore`."""
        row, tokens = example
        entry = (self._rows[row], tokens)
        if entry not in self._entries and self._kept.make_room(
            sum(array.nbytes for array in arrays.values())
        ):
            # Copied: a view would hold the whole batch that it was computed in.
            self._entries[entry] = {name: array.copy() for name, array in arrays.items()}
