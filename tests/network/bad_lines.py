"""Bad lines between devices and a coordinator: real kernels' TCP in network namespaces, over lines made here.

The kernel's own emulator (``tc qdisc … netem``) is a module that many kernels lack, those of CI machines among them. So
each device's namespace has a TUN interface, and this module carries the packets: late, at a rate, some not at all.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
HUB = "10.213.77.1"
#: Packets that wait for their turn on a line; further ones are dropped, as routers do.
MOST_WAITING = 64


@dataclass(frozen=True)
class Quality:
    """How bad a line is.

    Attributes:
        latency_s: time that a packet takes, one way.
        jitter_s: largest time that it may take on top.
        lost: share of the packets that are lost, in each direction.
        up_bits_per_s: rate from the device.
        down_bits_per_s: rate to the device.
        cut_every_s: mean time from one cut of the line to the next; 0 cuts none.
        cut_for_s: how long a cut lasts.
    """

    latency_s: float = 0.15
    jitter_s: float = 0.05
    lost: float = 0.02
    up_bits_per_s: float = 256_000.0
    down_bits_per_s: float = 2_000_000.0
    cut_every_s: float = 25.0
    cut_for_s: float = 3.0


@dataclass
class _Way:
    """One direction of a line."""

    rate: float
    free_s: float = 0.0
    waiting: int = 0


@dataclass
class Counts:
    """What happened on all lines."""

    carried: int = 0
    lost: int = 0
    dropped: int = 0
    cut: int = 0


@dataclass
class Line:
    """A device's line."""

    number: int
    descriptor: int
    up: _Way
    down: _Way
    cut_from_s: float
    cut_to_s: float = 0.0


@dataclass
class Lines:
    """All lines, carried by a thread.

    Attributes:
        quality: how bad they are.
        counts: what happened so far.
    """

    quality: Quality
    lot: random.Random
    hub: int
    lines: dict[int, Line] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    ended: threading.Event = field(default_factory=threading.Event)

    def carry(self) -> None:
        """Take packets where they come, and put them where they go, until the end."""
        due: list[tuple[float, int, int, bytes, _Way]] = []
        count = 0
        while not self.ended.is_set():
            now_s = time.monotonic()
            while due and due[0][0] <= now_s:
                _, _, descriptor, packet, way = heapq.heappop(due)
                way.waiting -= 1
                os.write(descriptor, packet)
            wait_s = min(0.2, due[0][0] - now_s) if due else 0.2
            descriptors = [self.hub, *(line.descriptor for line in self.lines.values())]
            for ready in select.select(descriptors, [], [], max(0.0, wait_s))[0]:
                packet = os.read(ready, 65536)
                end = self._end_of(ready, packet)
                if end is not None and (at_s := self._passes(end[0], end[2], len(packet))) is not None:
                    count += 1
                    heapq.heappush(due, (at_s, count, end[1], packet, end[2]))

    def _end_of(self, descriptor: int, packet: bytes) -> tuple[Line, int, _Way] | None:
        """The line of a packet, where it goes, and in which direction; None for what belongs to nobody."""
        if packet[0] >> 4 != 4:
            return None
        if descriptor == self.hub:
            line = self.lines.get(packet[19])
            return None if line is None else (line, line.descriptor, line.down)
        line = next(line for line in self.lines.values() if line.descriptor == descriptor)
        return line, self.hub, line.up

    def _passes(self, line: Line, way: _Way, size: int) -> float | None:
        """When a packet comes out at the other end; None if it does not."""
        now_s, quality = time.monotonic(), self.quality
        if quality.cut_every_s and now_s >= line.cut_from_s:
            line.cut_to_s = line.cut_from_s + quality.cut_for_s
            line.cut_from_s = line.cut_to_s + self.lot.expovariate(1 / quality.cut_every_s)
        if now_s < line.cut_to_s:
            self.counts.cut += 1
            return None
        if self.lot.random() < quality.lost:
            self.counts.lost += 1
            return None
        if way.waiting >= MOST_WAITING:
            self.counts.dropped += 1
            return None
        way.waiting += 1
        way.free_s = max(now_s, way.free_s) + 8 * size / way.rate
        self.counts.carried += 1
        return way.free_s + quality.latency_s + self.lot.uniform(0, quality.jitter_s)


@contextmanager
def bad_lines(devices: int, quality: Quality, seed: int) -> Iterator[tuple[Lines, list[str]]]:
    """Namespaces with a bad line each to ``HUB``; yields the lines, and the namespaces' names.

    Raises:
        OSError: namespaces or interfaces cannot be made here.
        subprocess.CalledProcessError: likewise.
    """
    lot = random.Random(seed)
    with ExitStack() as stack:
        hub, name = _interface(stack)
        _ip("addr", "add", f"{HUB}/24", "dev", name)
        _ip("link", "set", name, "up")
        lines = Lines(quality, lot, hub)
        spaces = []
        for number in range(2, devices + 2):
            space = f"edge-line-{os.getpid()}-{number}"
            _ip("netns", "add", space)
            stack.callback(_ip, "netns", "del", space)
            descriptor, name = _interface(stack)
            _ip("link", "set", name, "netns", space)
            for words in (
                ("link", "set", "lo", "up"),
                ("addr", "add", f"{HUB.rpartition('.')[0]}.{number}/24", "dev", name),
                ("link", "set", name, "up"),
            ):
                _ip("-n", space, *words)
            first_s = time.monotonic() + lot.uniform(0, quality.cut_every_s)
            ways = _Way(quality.up_bits_per_s), _Way(quality.down_bits_per_s)
            lines.lines[number] = Line(number, descriptor, *ways, first_s)
            spaces.append(space)
        thread = threading.Thread(target=lines.carry, name="bad-lines", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(lines.ended.set)
        yield lines, spaces


def _interface(stack: ExitStack) -> tuple[int, str]:
    """A new TUN interface: a descriptor of its packets, and its name."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    stack.callback(os.close, descriptor)
    asked = struct.pack("16sH", b"edge%d", IFF_TUN | IFF_NO_PI)
    told = fcntl.ioctl(descriptor, TUNSETIFF, asked)
    return descriptor, struct.unpack("16sH", told)[0].rstrip(b"\0").decode()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def unavailable() -> str | None:
    """Why there can be no bad lines here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    try:
        with bad_lines(1, Quality(), 0), socket.create_server((HUB, 0)):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made here: {error}"
