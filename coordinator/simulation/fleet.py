"""How simulated devices behave in time: when they ask, how long they work, and whether they answer.

Everything is a function of the simulation's seed and a task's round, slot and attempt, so equal seeds meet equal
fleets. Moments are multiples of 1/1024 s: sums of them are exact, and so a moment read back from the database is the
one that was meant.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import msgspec
import numpy as np

from coordinator.simulation.config import DropoutConfig, SpeedConfig
from coordinator.simulation.cost import forward_passes_per_example
from coordinator.simulation.partition import Share
from edge_runtime.package.manifest import Manifest
from edge_runtime.protocol.messages import Task
from edge_runtime.training.loop import count_steps

_TICKS = 1024
#: Keeps this draw apart from others by the same seed.
_STREAM = 0x5350_4545
_ADJOINT_STREAM, _CAP_STREAM = 0x4144_4A4F, 0x4341_5053


def tick(seconds: float) -> float:
    """The nearest moment."""
    return round(seconds * _TICKS) / _TICKS


def tick_after(seconds: float) -> float:
    """The first moment that is later."""
    return (math.floor(seconds * _TICKS) + 1) / _TICKS


def tick_from(seconds: float) -> float:
    """The first moment that is not earlier."""
    return math.ceil(seconds * _TICKS) / _TICKS


@dataclass(frozen=True)
class SimulatedDevice:
    """One device.

    Attributes:
        name: name of the device.
        rows: rows that it holds, as indices into the training file.
        factor: slowness of the device; the mean over devices is 1.
        adjoints: whether its engine can run adjoint programs.
        cap_share: share of the fleet's cap that it grants.
    """

    name: str
    rows: Share
    factor: float
    adjoints: bool
    cap_share: float = 1.0


class Fleet:
    """The devices of one seed, by name.

    Args:
        shares: rows of each device.
        speed: speed of the devices.
        dropout: frequency of drop-outs.
        seed: seed of the simulation.
        adjoints: share of the devices whose engine can run adjoint programs.
        half_cap: share of the devices that grant half of the fleet's cap.
    """

    def __init__(
        self,
        shares: list[Share],
        speed: SpeedConfig,
        dropout: DropoutConfig,
        seed: int,
        adjoints: float = 1.0,
        half_cap: float = 0.0,
    ) -> None:
        self._speed, self._dropout, self._seed = speed, dropout, seed
        factors = _factors(len(shares), speed, seed)
        names = [f"device-{number:0{len(str(len(shares) - 1))}d}" for number in range(len(shares))]
        order = np.random.Generator(np.random.PCG64([seed, _ADJOINT_STREAM])).permutation(len(shares))
        able = order < round(adjoints * len(shares))
        drawn = np.random.Generator(np.random.PCG64([seed, _CAP_STREAM])).permutation(len(shares))
        granted = np.where(drawn < round(half_cap * len(shares)), 0.5, 1.0)
        self.devices = {
            name: SimulatedDevice(name, rows, factor, bool(can), float(share))
            for name, rows, factor, can, share in zip(names, shares, factors, able, granted, strict=True)
        }

    def poll_delay_s(self, task_id: str, poll_min_s: float, poll_max_s: float) -> float:
        """Seconds until a device that waits asks again and learns that it holds a slot.

        Devices come back after a time in [``poll_min_s``, ``poll_max_s``]; the slot is reserved anywhere within it.

        Args:
            task_id: id of the task.
            poll_min_s: least seconds between two check-ins.
            poll_max_s: most seconds between two check-ins.
        """
        window_s = poll_min_s + self._unit(task_id, "window") * (poll_max_s - poll_min_s)
        return tick(self._unit(task_id, "poll") * window_s)

    def drops(self, task_id: str) -> bool:
        """Whether the device that got this task never answers."""
        return self._unit(task_id, "dropout") < self._dropout.rate

    def duration_s(self, task: Task, manifest: Manifest, device: SimulatedDevice) -> float:
        """Virtual seconds between getting a task of a package and handing in its result."""
        rows = len(device.rows)
        examples = count_steps(task, rows) * min(task.batch_size, rows)
        if task.update == "best":
            task = msgspec.structs.replace(task, update="backprop" if device.adjoints else "forward")
        work = examples * forward_passes_per_example(task, manifest) * self._speed.seconds_per_example
        return tick(self._speed.overhead_s + work * device.factor)

    def _unit(self, task_id: str, purpose: str) -> float:
        """A number in [0, 1) for one attempt at a slot of a round; the run's random id plays no part."""
        attempt = task_id.rsplit("-", 3)[1:]  # round, slot and attempt
        digest = hashlib.sha256("/".join([str(self._seed), *attempt, purpose]).encode()).digest()
        return int.from_bytes(digest[:8]) / 2.0**64


def _factors(count: int, speed: SpeedConfig, seed: int) -> list[float]:
    """Each device's slowness, with mean 1."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _STREAM])))
    if speed.spread == "equal":
        return [1.0] * count
    if speed.spread == "exponential":
        return [float(factor) for factor in generator.standard_exponential(count)]
    return [math.exp(float(number) - 0.5) for number in generator.standard_normal(count)]
