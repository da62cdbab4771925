"""Whether the device may work now: what its operator asks of power, heat, load, memory, disk, network, hours and rows.

The device decides, and tells the coordinator the reason as a code. A fact that this machine does not tell keeps nobody
from working, and is named in the log.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Annotated, Literal, TypeVar

from msgspec import Meta, Struct

from edge_runtime.agent.conditions import Conditions
from edge_runtime.config_file import MAX_SIZE_BYTES
from edge_runtime.errors import ConfigError
from edge_runtime.log import warn
from edge_runtime.protocol.messages import END, Count

#: Why a device takes no task now; docs/protocol.md explains each. A code never changes its meaning.
Reason = Literal[
    "outside_hours",
    "on_battery",
    "battery_low",
    "too_hot",
    "load",
    "memory_pressure",
    "little_memory",
    "little_disk",
    "metered_network",
    "few_rows",
]
#: The only reason that does not keep a device from taking a release.
ABOUT_TRAINING: frozenset[Reason] = frozenset({"few_rows"})
#: How far a device cools down before it works again, unless its operator says how far.
HYSTERESIS_CELSIUS = 10.0

Percent = Annotated[float, Meta(ge=0, le=100)]
Celsius = Annotated[float, Meta(ge=0, le=150)]
Hours = Annotated[str, Meta(pattern=rf"^[0-9]{{2}}:[0-9]{{2}}-[0-9]{{2}}:[0-9]{{2}}{END}")]
_HOURS_FORM = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")
FactT = TypeVar("FactT")


class Eligibility(Struct, frozen=True, forbid_unknown_fields=True):
    """When a device takes tasks; nothing is asked of it unless a key says so.

    It is looked at before each check-in, and again while a task is trained. A result that waits is delivered at any
    time.

    Attributes:
        mains_only: whether a device with a battery works on mains alone.
        least_battery_percent: charge under which a device with a battery does not work.
        highest_celsius: temperature of the hottest sensor above which the device does not work; unset: any.
        resume_celsius: temperature to which it then cools down before it works again; unset: 10 under
            ``highest_celsius``.
        highest_load_per_core: average number of running processes in the last minute, for each core, above which the
            device does not work; its own last task counts, too. Unset: any.
        highest_memory_pressure_percent: share of the last minute in which processes waited for memory (the kernel's
            PSI), above which the device does not work; unset: any.
        needs_free_memory: whether as much memory must be free as the last task's plan took, or the cap before the first
            task.
        least_free_disk: disk space that must be free beside ``state_folder``'s content; 0 asks for none.
        unmetered_only: whether the device works only where NetworkManager does not call the network metered.
        hours: times of day, local time, within which the device works: ``["22:00-06:00"]``; empty: any.
        least_rows: number of rows under which the device does not train; it still takes releases.
    """

    mains_only: bool = False
    least_battery_percent: Percent = 0.0
    highest_celsius: Celsius | None = None
    resume_celsius: Celsius | None = None
    highest_load_per_core: Annotated[float, Meta(gt=0, le=1000)] | None = None
    highest_memory_pressure_percent: Percent | None = None
    needs_free_memory: bool = False
    least_free_disk: Annotated[int, Meta(ge=0, le=MAX_SIZE_BYTES)] = 0
    unmetered_only: bool = False
    hours: Annotated[tuple[Hours, ...], Meta(max_length=24)] = ()
    least_rows: Count = 0

    @property
    def cool_celsius(self) -> float | None:
        """Temperature at which a device that was too hot works again."""
        if self.highest_celsius is None or self.resume_celsius is not None:
            return self.resume_celsius
        return max(0.0, self.highest_celsius - HYSTERESIS_CELSIUS)


def check_eligibility(settings: Eligibility) -> None:
    """Check what no single value's bounds can say.

    Raises:
        ConfigError: temperatures are the wrong way round, or a time of day does not exist.
    """
    highest, resume = settings.highest_celsius, settings.resume_celsius
    if resume is not None and (highest is None or resume > highest):
        raise ConfigError(
            f"eligibility.resume_celsius is {resume:g}, and highest_celsius "
            f"{'is not set' if highest is None else f'is {highest:g}'}; cooling down starts above it: set it higher"
        )
    for hours in settings.hours:
        start, end = _minutes(hours)
        if start == end:
            raise ConfigError(
                f'eligibility.hours has "{hours}", which begins when it ends; leave hours out for the whole day'
            )


def _minutes(hours: str) -> tuple[int, int]:
    """First minute of the day within hours, and the first one after them."""
    match = _HOURS_FORM.fullmatch(hours)
    if match is None:
        raise ConfigError(f'eligibility.hours has "{hours}"; write times of day as "22:00-06:00"')
    start_h, start_min, end_h, end_min = map(int, match.groups())
    return 60 * start_h + start_min, 60 * end_h + end_min


def is_within(hours: str, minute: int) -> bool:
    """Whether a minute of the day is within hours; where these end before they begin, midnight lies between."""
    start, end = _minutes(hours)
    return start <= minute < end if start < end else minute >= start or minute < end


class Gate:
    """Decides whether the device may work, again and again: it knows whether it cools down.

    Args:
        settings: what the operator asks for.
        conditions: what the machine says.
        local_time: source of the time of day.
    """

    def __init__(
        self,
        settings: Eligibility,
        conditions: Conditions,
        local_time: Callable[[], time.struct_time] = time.localtime,
    ) -> None:
        self._settings = settings
        self._conditions = conditions
        self._local_time = local_time
        self._cools_down = False
        self._said: set[str] = set()

    def reason(self, *, rows: int, needed_bytes: int) -> Reason | None:
        """Why the device may not work now; None if it may.

        Args:
            rows: number of rows that it trains on.
            needed_bytes: memory that a task takes.
        """
        return next(self._reasons(rows, needed_bytes), None)

    def reason_to_stop(self) -> Reason | None:
        """Why a task that is being trained must stop; what the task itself brings about is none."""
        return next(chain(self._of_hours(), self._of_power(), self._of_heat()), None)

    @property
    def looks_at_work(self) -> bool:
        """Whether there is anything that could stop a task."""
        asked = self._settings
        return bool(
            asked.hours
            or asked.mains_only
            or asked.least_battery_percent
            or asked.highest_celsius is not None
        )

    @property
    def unknown(self) -> list[str]:
        """What was asked for so far and the machine does not tell."""
        return sorted(self._said)

    def _reasons(self, rows: int, needed_bytes: int) -> Iterator[Reason]:
        """All reasons, in the order in which they are told; those that cost most to find out come last."""
        asked, told = self._settings, self._conditions
        yield from self._of_hours()
        if rows < asked.least_rows:
            yield "few_rows"
        yield from self._of_power()
        yield from self._of_heat()
        if (highest := asked.highest_load_per_core) is not None:
            load = self._known("load", told.load_per_core)
            if load is not None and load > highest:
                yield "load"
        if (highest := asked.highest_memory_pressure_percent) is not None:
            pressure = self._known("memory pressure", told.memory_pressure_percent)
            if pressure is not None and pressure > highest:
                yield "memory_pressure"
        if asked.needs_free_memory:
            free_bytes = self._known("free memory", told.free_memory_bytes)
            if free_bytes is not None and free_bytes < needed_bytes:
                yield "little_memory"
        if asked.least_free_disk and told.free_disk_bytes < asked.least_free_disk:
            yield "little_disk"
        if asked.unmetered_only and self._known("metered network", told.metered):
            yield "metered_network"

    def _of_hours(self) -> Iterator[Reason]:
        if not self._settings.hours:
            return
        now = self._local_time()
        minute = 60 * now.tm_hour + now.tm_min
        if not any(is_within(hours, minute) for hours in self._settings.hours):
            yield "outside_hours"

    def _of_power(self) -> Iterator[Reason]:
        if self._settings.mains_only and not self._conditions.on_mains:
            yield "on_battery"
        if self._settings.least_battery_percent:
            charge = self._conditions.battery_percent  # a device without a battery has nothing to save
            if charge is not None and charge < self._settings.least_battery_percent:
                yield "battery_low"

    def _of_heat(self) -> Iterator[Reason]:
        highest, cool = self._settings.highest_celsius, self._settings.cool_celsius
        if highest is None or cool is None:
            return
        celsius = self._known("temperature", self._conditions.celsius)
        if celsius is None:
            return
        self._cools_down = celsius > (cool if self._cools_down else highest)
        if self._cools_down:
            yield "too_hot"

    def _known(self, what: str, fact: FactT | None) -> FactT | None:
        """A fact; that the machine does not tell it is said once."""
        if fact is None and what not in self._said:
            self._said.add(what)
            warn(
                "eligibility_unknown",
                what=what,
                message="the machine does not tell, so it keeps nobody from work",
            )
        return fact
