"""Clocks are set on either side at any moment of a run: it ends in the same bits, and nobody is shut out."""

from __future__ import annotations

import random
from email.utils import formatdate
from pathlib import Path

from edge_runtime.agent.client import Client
from edge_runtime.agent.transport import Request, Response
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import CheckInRequest, ResultReceipt, SignedTask, Task, encode_result
from tests.coordinator.conftest import FakeDevice, World

STEPS = 60
#: The agent corrects differences of less than a day: half of that on each side.
MOST_S = 11 * 3600.0
CHECK_IN = CheckInRequest("test", 1 << 30, 1 << 20, 10)


class InProcess:
    """The agent's way to a coordinator in the test's own thread, whose answers are dated by its machine's clock."""

    def __init__(self, world: World) -> None:
        self.world = world

    def send(self, request: Request) -> Response:
        """The answer to a request."""
        answer = self.world.client.request(
            request.method, request.path, content=request.body, headers=dict(request.headers)
        )
        date = formatdate(self.world.wall(), usegmt=True)
        headers = {name.lower(): value for name, value in answer.headers.items()}
        return Response(answer.status_code, {**headers, "date": date}, answer.content)


class Offsets:
    """How far clocks are set off the right time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.coordinator_s = 0.0
        self.devices_s = {"a": 0.0, "b": 0.0}

    def wall(self) -> float:
        """The coordinator's machine's clock."""
        return self.world.clock.now_s + self.coordinator_s

    def step(self, source: random.Random) -> None:
        """Set some clock."""
        offset_s = source.uniform(-MOST_S, MOST_S)
        which = source.choice(("coordinator", *self.devices_s))
        if which == "coordinator":
            self.coordinator_s = offset_s
        else:
            self.devices_s[which] = offset_s


def run_through(world: World, source: random.Random | None) -> tuple[bytes, int]:
    """The values in which a run ends, and how often a clock was set before a request or a pass of the coordinator."""
    offsets, steps = Offsets(world), 0
    world.wall = offsets.wall
    devices = world.fleet("a", "b")
    world.start()
    world.create_run(rounds=15, split="whole", deadline_s=600.0, selection_timeout_s=600.0)

    def client_of(device: FakeDevice) -> Client:
        def clock() -> float:
            return world.clock.now_s + offsets.devices_s[device.name]

        return Client(InProcess(world), device.key, device.device_id, clock)

    clients = {device.name: client_of(device) for device in devices}
    while world.run()["state"] != "finished":
        world.clock.now_s += 1.0
        for device in devices:
            if source is not None:
                offsets.step(source)
                steps += 1
            world.play()
            answer = clients[device.name].check_in(CHECK_IN)
            if not isinstance(answer, SignedTask):
                continue
            if source is not None:
                offsets.step(source)
                steps += 1
            task = messages.decode(answer.task.encode(), Task)
            receipt = clients[device.name].put_result(task.task_id, encode_result(device.result(task)))
            assert receipt == ResultReceipt("counted")
        if source is not None and source.random() < 0.3:
            world.start()
        world.play()
    return world.values(), steps


def test_steps_of_clocks_cost_nothing(tmp_path: Path) -> None:
    """With a clock of some side set before every request, by hours, a run ends in the bits of one with right clocks."""
    right = World(tmp_path)
    expected, _ = run_through(right, None)
    (tmp_path / "wrong").mkdir()
    wrong = World(tmp_path / "wrong", right.publisher)
    values, steps = run_through(wrong, random.Random(9))
    states = {row["state"] for row in wrong.run()["rounds"]}
    print(f"clocks set {steps} times: the same bits")
    assert steps >= STEPS
    assert states == {"committed"}
    assert values == expected
    for world in (right, wrong):
        world.stores.storage.close()
