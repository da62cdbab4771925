"""Slice values that compute what an adapter computes, so that a run can go on from an adapter.

How a kind of slices does that is in its module of :mod:`export.slices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import FloatArray, Values, key
from export.adapters.read import Adapter
from export.slices.kinds import KINDS
from export.slices.sliced_linear import Frozen

#: Gives a slice's frozen tensor by its name within the slice.
FrozenOf = Callable[[SliceSpec, str], FloatArray]


def start_values(adapter: Adapter, specs: Iterable[SliceSpec], frozen: FrozenOf) -> Values:
    """Values of all slices that an adapter speaks for.

    Args:
        adapter: adapter to start from.
        specs: slices of the package.
        frozen: gives a slice's frozen tensor by its name; asked only by kinds that have some.

    Returns:
        Values by flat name; the head's are among them if the adapter has a head.

    Raises:
        ModelError: the adapter has no factors for a slice, or factors for none; shapes differ; or the update lies
            outside a slice's span.
    """
    values: Values = {}
    used = set()
    for spec in specs:
        if spec.kind == "head":
            values |= {key(spec.name, name): part for name, part in (adapter.head or {}).items()}
        else:
            if spec.target not in adapter.pairs:
                raise ModelError(f"{adapter.folder} has no factors for slice {spec.name} of the package")
            used.add(spec.target)
            values |= _slice_values(adapter, spec, partial(frozen, spec))
        _check_shapes(adapter, spec, values)
    if unused := sorted(set(adapter.pairs) - used):
        raise ModelError(
            f"{adapter.folder} adapts {unused[0]}, which is no linear layer of the model's blocks; "
            "is it for another model?"
        )
    return values


def _slice_values(adapter: Adapter, spec: SliceSpec, frozen: Frozen) -> Values:
    pair = adapter.pairs[spec.target]
    whole = (pair.a, pair.b, adapter.scale)
    started = KINDS[spec.kind].start(str(adapter.folder), spec.target, whole, frozen)
    return {key(spec.name, name): value for name, value in started.items()}


def _check_shapes(adapter: Adapter, spec: SliceSpec, values: Values) -> None:
    for tensor in spec.tensors:
        value = values.get(key(spec.name, tensor.name))
        if value is not None and value.shape != tensor.shape:
            raise ModelError(
                f"{adapter.folder} has {tensor.name} {value.shape} for {spec.name}, the model needs {tensor.shape}; "
                "is it for another model?"
            )
