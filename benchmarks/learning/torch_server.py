"""The server of a fleet in torch: cores and head, moved by the coordinator's own optimisers, and the solved head."""

from __future__ import annotations

import msgspec
import numpy as np

from benchmarks.learning.torch_fleet import Matrix, RoundGradients, TorchFleet
from coordinator.aggregation.closed_form import solve
from coordinator.aggregation.server_optimizers import Moments, step
from coordinator.config import ServerOptimizerConfig


class TorchServer:
    """Values of a run, which begin at zero, and what its optimisers remember.

    Args:
        fleet: the fleet that they are trained on.
        cores: optimiser of the cores.
        head: optimiser of the head; None leaves the head to :meth:`solve`.
    """

    def __init__(
        self, fleet: TorchFleet, cores: ServerOptimizerConfig, head: ServerOptimizerConfig | None
    ) -> None:
        self._fleet = fleet
        self.cores = np.zeros(fleet.size, np.float32)
        self.weight = np.zeros((fleet.classes, fleet.width), np.float32)
        self.bias = np.zeros(fleet.classes, np.float32)
        self._optimizers = {"cores": cores} | ({} if head is None else {"weight": head, "bias": head})
        self._moments = {
            name: Moments.initial(getattr(self, name).shape, optimizer)
            for name, optimizer in self._optimizers.items()
        }

    def gradients(self, rows: list[int]) -> RoundGradients:
        """What a round's rows say of the values that there are."""
        return self._fleet.gradients(rows, self.cores, self.weight, self.bias)

    def move(self, cores: Matrix, found: RoundGradients, share: float, rate: float | None = None) -> None:
        """One step against a round's gradients.

        Args:
            cores: mean gradient of the cores, or an estimate of it, (d,).
            found: what the round's rows said; the head's gradient is exact.
            share: what is left of the rates in this round.
            rate: rate of the cores in place of their optimiser's own.
        """
        gradients = {
            "cores": cores,
            "weight": found.residuals.T @ found.features / len(found.losses),
            "bias": found.residuals.mean(axis=0),
        }
        for name, optimizer in self._optimizers.items():
            own = rate if rate is not None and name == "cores" else optimizer.number
            config = msgspec.structs.replace(optimizer, rate=own * share)
            moved, self._moments[name] = step(
                getattr(self, name), -gradients[name].astype(np.float64), self._moments[name], config
            )
            setattr(self, name, moved)

    def solve(self) -> None:
        """Take the head in closed form, from sums over all training rows at these cores."""
        head = solve(self._fleet.sums(self.cores))
        self.weight, self.bias = head.weight, head.bias

    def evaluate(self) -> tuple[float, float]:
        """Accuracy in percent and mean loss on the dev rows."""
        return self._fleet.evaluate(self.cores, self.weight, self.bias)
