"""What the server keeps from one round to the next beside the values: one object, stored as one blob.

Everything is stored in the precision in which it is computed, so a server that was restored from the blob goes on with
the very same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from coordinator.aggregation.mean import Sum, Sums
from coordinator.aggregation.own_rate import OwnRate
from coordinator.aggregation.server_optimizers import DoubleArray, Moments
from edge_runtime.errors import DigestError
from edge_runtime.package.slices import Values
from edge_runtime.training.feature_sums import FeatureSums

Array = NDArray[Any]
HALVES = ("even", "odd")


@dataclass(frozen=True)
class Average:
    """Equal-weight mean of the values after several rounds (SWA: Izmailov et al. 2018, arXiv 1803.05407, section 3).

    Attributes:
        totals: sums of the values in float64, by flat name.
        rounds: number of rounds that were added; with 0 there is no mean yet.
    """

    totals: Mapping[str, DoubleArray] = field(default_factory=dict)
    rounds: int = 0

    def plus(self, values: Values) -> Average:
        """This mean with the values after one more round added."""
        more = {name: array.astype(np.float64) for name, array in values.items()}
        totals = {name: self.totals[name] + more[name] for name in more} if self.rounds else more
        return Average(totals, self.rounds + 1)

    @property
    def values(self) -> Values:
        """The mean, rounded to float32."""
        return {name: (total / self.rounds).astype(np.float32) for name, total in self.totals.items()}


@dataclass(frozen=True)
class ServerState:
    """State of a run's server.

    Attributes:
        moments: optimiser state by flat name; a missing entry is the initial state.
        average: mean of the values after each round from ``average_from_round`` on.
        reference: latest mean delta of each tensor that was ever trained, with which directions may be compared; or
            the last step of each, along which the loss is measured.
        kept: sums that the gate holds back: those of even slots, those of odd slots.
        sums: sums for a head in closed form, over the devices that the present visit has heard of; None outside one.
        ridge: ridge of the head that was last solved from them; 0 before that.
        own: what is known of the slices' rate, if it sets itself.
        row_scores: scores of the rows that slices of rows choose from, by slice.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    average: Average = Average()
    reference: Values = field(default_factory=dict)
    kept: tuple[Sums, Sums] = field(default_factory=lambda: ({}, {}))
    sums: FeatureSums | None = None
    ridge: float = 0.0
    own: OwnRate = field(default_factory=OwnRate)
    row_scores: Mapping[str, Array] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Safetensors bytes; each tensor's name says which part it belongs to, and equal states give equal bytes."""
        flat: dict[str, Array] = {
            **_named("m", {name: each.m for name, each in self.moments.items()}),
            **_named("v", {name: each.v for name, each in self.moments.items()}),
            **_named("average", self.average.totals),
            "averaged rounds": np.array([self.average.rounds]),
            **_named("reference", self.reference),
        }
        for half, sums in zip(HALVES, self.kept, strict=True):
            flat |= _named(half, {name: each.total for name, each in sums.items()})
            weights = {name: np.array([each.examples, each.steps]) for name, each in sums.items()}
            flat |= _named(f"{half} weights", weights)
        if self.sums is not None:
            # The Gram matrix is symmetric, so half of it is kept.
            half_gram = self.sums.gram[np.triu_indices(len(self.sums.gram))]
            flat |= {"sums:gram": half_gram, "sums:linear": self.sums.linear, "sums:counts": self.sums.counts}
            flat |= {"sums:rows": np.array([self.sums.rows]), "sums:ridge": np.array([self.ridge])}
        flat |= _named("row scores", self.row_scores)
        if self.own != OwnRate():
            flat |= {"own rate": np.array(astuple(self.own))}
        return bytes(save({name: np.ascontiguousarray(flat[name]) for name in sorted(flat)}))

    @classmethod
    def decode(cls, data: bytes) -> ServerState:
        """The state from the bytes of :meth:`encode`; :class:`DigestError` if these are other bytes."""
        try:
            flat = load(data)
            v = _part(flat, "v")
            rounds = flat.get("averaged rounds")
            return cls(
                moments={name: Moments(m, v[name]) for name, m in _part(flat, "m").items()},
                average=Average(_part(flat, "average"), 0 if rounds is None else int(rounds[0])),
                reference=_part(flat, "reference"),
                kept=(_sums(flat, HALVES[0]), _sums(flat, HALVES[1])),
                sums=_feature_sums(flat),
                ridge=float(flat["sums:ridge"][0]) if "sums:ridge" in flat else 0.0,
                own=OwnRate(*flat["own rate"].tolist()) if "own rate" in flat else OwnRate(),
                row_scores=_part(flat, "row scores"),
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DigestError(f"the stored server state cannot be read: {error}") from error


def _named(part: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{part}:{name}": array for name, array in arrays.items()}


def _sums(flat: Mapping[str, Array], half: str) -> Sums:
    weights = _part(flat, f"{half} weights")
    return {name: Sum(total, *weights[name].tolist()) for name, total in _part(flat, half).items()}


def _feature_sums(flat: Mapping[str, Array]) -> FeatureSums | None:
    if "sums:gram" not in flat:
        return None
    linear = flat["sums:linear"]
    gram = np.zeros((len(linear), len(linear)))
    upper = np.triu_indices(len(linear))
    gram[upper] = flat["sums:gram"]
    gram.T[upper] = flat["sums:gram"]
    return FeatureSums(int(flat["sums:rows"][0]), gram, linear, flat["sums:counts"])


def _part(flat: Mapping[str, Array], part: str) -> dict[str, Array]:
    return {name[len(part) + 1 :]: array for name, array in flat.items() if name.startswith(f"{part}:")}
