"""What the server keeps from one round to the next beside the values: one object, one blob.

Restored from its bytes it continues with the very same bits: everything is stored in the precision it is computed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from coordinator.server_optimizers import DoubleArray, Moments
from edge_runtime.errors import DigestError


@dataclass(frozen=True)
class ServerState:
    """State of a run's server.

    Attributes:
        moments: of the server's optimisers, by flat name; a missing one is initial.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Safetensors bytes, a part in front of each tensor's name; equal states, equal bytes."""
        flat = {
            **_named("m", {name: each.m for name, each in self.moments.items()}),
            **_named("v", {name: each.v for name, each in self.moments.items()}),
        }
        return bytes(save({name: np.ascontiguousarray(flat[name]) for name in sorted(flat)}))

    @classmethod
    def decode(cls, data: bytes) -> ServerState:
        """Inverse of :meth:`encode`; :class:`DigestError` if these are other bytes."""
        try:
            flat = load(data)
            v = _part(flat, "v")
            return cls(moments={name: Moments(m, v[name]) for name, m in _part(flat, "m").items()})
        except (SafetensorError, ValueError, KeyError) as error:
            raise DigestError(f"the stored server state cannot be read: {error}") from error


def _named(part: str, arrays: Mapping[str, DoubleArray]) -> dict[str, DoubleArray]:
    return {f"{part}:{name}": array for name, array in arrays.items()}


def _part(flat: Mapping[str, DoubleArray], part: str) -> dict[str, DoubleArray]:
    return {name[len(part) + 1 :]: array for name, array in flat.items() if name.startswith(f"{part}:")}
