"""Local optimisers: from gradients to a change of the slices' values.

``accumulate`` and ``sgd`` are linear in the estimates, so noise averages out over devices before anything is
normalised; ``adamw`` normalises on the device and is here for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.package.slices import HEAD_PREFIX, FloatArray, Values
from edge_runtime.protocol.messages import LocalOptimizer

Array = NDArray[Any]


class Optimizer(Protocol):
    """Holds the values of a task and changes them."""

    def values(self) -> Values:
        """Values at which the next gradient is to be taken."""
        ...

    def step(self, gradient: Values) -> None:
        """Take one gradient; tensors it does not name stay as they are."""
        ...

    def delta(self) -> Values:
        """Change of each trained tensor since the start."""
        ...

    def state(self) -> dict[str, Array]:
        """Everything that later steps depend on, by name."""
        ...

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a state that :meth:`state` gave.

        Raises:
            KeyError: a part of it is missing.
        """
        ...


def make_optimizer(settings: LocalOptimizer, start: Values, trained: list[str]) -> Optimizer:
    """The optimiser a task asks for.

    Args:
        settings: rule and rates of the optimiser.
        start: all values, by flat name; not modified.
        trained: flat names of the tensors that the task trains.
    """
    kinds: dict[str, type[Accumulate] | type[Sgd] | type[AdamW]]
    kinds = {"accumulate": Accumulate, "sgd": Sgd, "adamw": AdamW}
    return kinds[settings.name](settings, start, trained)


class _Base:
    def __init__(self, settings: LocalOptimizer, start: Values, trained: list[str]) -> None:
        self._settings = settings
        self._start = start
        self._delta: Values = {name: np.zeros_like(start[name]) for name in trained}

    def _rate(self, name: str) -> np.float32:
        rate = self._settings.head_rate if name.startswith(HEAD_PREFIX) else self._settings.slice_rate
        return np.float32(rate)

    def values(self) -> Values:
        return {**self._start, **{name: self._start[name] + moved for name, moved in self._delta.items()}}

    def delta(self) -> Values:
        return self._delta

    def state(self) -> dict[str, Array]:
        return {f"delta/{name}": moved for name, moved in self._delta.items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        self._delta = {name: state[f"delta/{name}"] for name in self._delta}


class Sgd(_Base):
    """change = -rate · Σ gradients, each taken at the values after the last step."""

    def step(self, gradient: Values) -> None:
        for name, slope in gradient.items():
            self._delta[name] -= self._rate(name) * slope


class Accumulate(Sgd):
    """The same sum, but all gradients are taken at the values that the task came with."""

    def values(self) -> Values:
        return self._start


class AdamW(_Base):
    """Adam without weight decay on such small slices (Kingma & Ba 2015, Algorithm 1).

    Its state starts afresh in each task.
    """

    BETA1, BETA2, EPSILON = np.float32(0.9), np.float32(0.999), np.float32(1e-8)

    def __init__(self, settings: LocalOptimizer, start: Values, trained: list[str]) -> None:
        super().__init__(settings, start, trained)
        # Running products: a library's power may differ in its last bit from CPU to CPU, a product does not.
        self._power1, self._power2 = 1.0, 1.0
        self._first: dict[str, FloatArray] = {name: np.zeros_like(start[name]) for name in trained}
        self._second: dict[str, FloatArray] = {name: np.zeros_like(start[name]) for name in trained}

    def step(self, gradient: Values) -> None:
        self._power1 *= float(self.BETA1)
        self._power2 *= float(self.BETA2)
        first_scale, second_scale = np.float32(1 - self._power1), np.float32(1 - self._power2)
        for name, slope in gradient.items():
            self._first[name] = self.BETA1 * self._first[name] + (1 - self.BETA1) * slope
            self._second[name] = self.BETA2 * self._second[name] + (1 - self.BETA2) * slope * slope
            root = np.sqrt(self._second[name] / second_scale) + self.EPSILON
            self._delta[name] -= self._rate(name) * (self._first[name] / first_scale) / root

    def state(self) -> dict[str, Array]:
        moments = {"first": self._first, "second": self._second}
        kept = {f"{kind}/{name}": value for kind, values in moments.items() for name, value in values.items()}
        return {**super().state(), **kept, "powers": np.array([self._power1, self._power2], np.float64)}

    def restore(self, state: Mapping[str, Array]) -> None:
        super().restore(state)
        self._first = {name: state[f"first/{name}"] for name in self._first}
        self._second = {name: state[f"second/{name}"] for name in self._second}
        self._power1, self._power2 = map(float, state["powers"])
