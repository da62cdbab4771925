"""Local optimisers: from gradients to a change of the slices' values.

``accumulate`` and ``sgd`` are linear in the estimates, so noise averages out over devices before anything is
normalised; ``adamw`` normalises on the device and is here for comparison, and ``sgc`` is that with compressed moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.package.slices import HEAD_PREFIX, FloatArray, Values
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.training.sketch import Sketch

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


def make_optimizer(
    settings: LocalOptimizer, start: Values, trained: list[str], sketch: Sketch | None = None
) -> Optimizer:
    """The optimiser a task asks for.

    Args:
        settings: rule and rates of the optimiser.
        start: all values, by flat name; not modified.
        trained: flat names of the tensors that the task trains.
        sketch: how ``"sgc"`` keeps its moments; others pass over it.

    Raises:
        ConfigError: ``"sgc"`` was given no sketch.
    """
    if settings.name == "sgc":
        if sketch is None:
            raise ConfigError('local_optimizer "sgc" keeps sketches: set sketch_size and sketch_entries')
        return CompressedAdam(settings, start, trained, sketch)
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


class CompressedAdam(_Base):
    """SGC: Adam whose two moments of a slice are sketches, 2·k numbers whatever the slice's size (arXiv 2502.00311).

    With the sketch A·top_s(g) of a step's gradient g, and g̃ = top_s(g),

        p = β1 p + (1 - β1) A·g̃,  q = β2 q + (1 - β2) A·(g̃ ∘ g̃),

    a step takes the moments that p and q stand for: that of p is found by matching pursuit, that of q at the same
    places, and never less than true moments could have (by Cauchy and Schwarz), or a step would be divided by next to
    nothing. This rule for the second moment is a stand-in: the paper's text was not at hand. The
    head, whose exact gradient is dense, has Adam's own moments. As with ``adamw``, the state starts afresh in each
    task.
    """

    def __init__(self, settings: LocalOptimizer, start: Values, trained: list[str], sketch: Sketch) -> None:
        super().__init__(settings, start, trained)
        self._sketch = sketch
        self._head = AdamW(settings, start, [name for name in trained if name.startswith(HEAD_PREFIX)])
        self._power1, self._power2 = 1.0, 1.0
        self._tensors: dict[str, list[str]] = {}
        for name in trained:
            if not name.startswith(HEAD_PREFIX):
                self._tensors.setdefault(name.rpartition("/")[0], []).append(name)
        self._first = {of: np.zeros(sketch.size, np.float32) for of in self._tensors}
        self._second = {of: np.zeros(sketch.size, np.float32) for of in self._tensors}

    def step(self, gradient: Values) -> None:
        self._head.step({name: slope for name, slope in gradient.items() if name.startswith(HEAD_PREFIX)})
        self._delta |= self._head.delta()
        self._power1 *= float(AdamW.BETA1)
        self._power2 *= float(AdamW.BETA2)
        for of, names in self._tensors.items():
            if names[0] in gradient:
                self._step_slice(of, np.concatenate([gradient[name].ravel() for name in names]))

    def _step_slice(self, of: str, slope: FloatArray) -> None:
        """Take the gradient (d,) of a slice's tensors side by side."""
        beta1, beta2 = float(AdamW.BETA1), float(AdamW.BETA2)
        first, second = self._sketch.of(slope), self._sketch.of_squares(slope)
        self._first[of] = (beta1 * self._first[of] + (1 - beta1) * first).astype(np.float32)
        self._second[of] = (beta2 * self._second[of] + (1 - beta2) * second).astype(np.float32)
        places, mean, square = self._sketch.both_found(self._first[of], self._second[of], len(slope))
        mean, square = mean / (1 - self._power1), square / (1 - self._power2)
        root = np.sqrt(np.maximum(square, mean * mean / self._most_ratio())) + float(AdamW.EPSILON)
        moved = np.zeros(len(slope), np.float32)
        moved[places] = self._rate(of) * (mean / root).astype(np.float32)
        begin = 0
        for name in self._tensors[of]:
            delta = self._delta[name]
            delta -= moved[begin : begin + delta.size].reshape(delta.shape)
            begin += delta.size

    def _most_ratio(self) -> float:
        """The most that m̂² / v̂ of true moments can be after so many steps: Σ a² / b over the weights of both means."""
        share = float(AdamW.BETA1) ** 2 / float(AdamW.BETA2)
        of_first = (1 - float(AdamW.BETA1)) / (1 - self._power1)
        of_second = (1 - float(AdamW.BETA2)) / (1 - self._power2)
        return of_first**2 / of_second * (1 - self._power1**2 / self._power2) / (1 - share)

    def state(self) -> dict[str, Array]:
        head = {f"head {name}": value for name, value in self._head.state().items()}
        moments = {"first": self._first, "second": self._second}
        kept = {f"{kind}/{of}": value for kind, values in moments.items() for of, value in values.items()}
        return {
            **super().state(),
            **head,
            **kept,
            "powers": np.array([self._power1, self._power2], np.float64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        super().restore(state)
        self._head.restore({name.removeprefix("head "): value for name, value in state.items()})
        self._first = {of: state[f"first/{of}"] for of in self._first}
        self._second = {of: state[f"second/{of}"] for of in self._second}
        self._power1, self._power2 = map(float, state["powers"])
