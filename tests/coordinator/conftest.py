"""A tiny hand-made package, a fleet of in-memory devices, and a coordinator in the test's own thread."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from litestar.testing import TestClient

from benchmarks.coordinator import hand_made
from benchmarks.coordinator.hand_made import RUN, slice_spec
from coordinator.api.app import create_app
from coordinator.storage.stores import Places, Stores
from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    CheckInRequest,
    EnrolRequest,
    MemoryReport,
    Result,
    SignedTask,
    Task,
)
from edge_runtime.protocol.signing import PrivateKey, generate_key, sign_request
from edge_runtime.training.line import LINE
from edge_runtime.training.methods import measures_line
from tests.coordinator.formula import delta_of, examples_of, report_of

CAP_BYTES = 1 << 30
#: A row of data that fits the package, as a file.
ROW = '{"text": "a", "label": "yes"}\n'


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


SPECS = (
    slice_spec("s0", 0, (1, 2)),
    slice_spec("s1", 0, (1, 2, 2)),
    slice_spec("s2", 1, (1, 3)),
    slice_spec("head", 1, (1, 2, 2), "head"),
)


def lora_spec(name: str, d_out: int, d_in: int, rank: int) -> SliceSpec:
    """A plain LoRA slice."""
    tensors = (
        TensorSpec("A", (1, rank, d_in), f"{name}.A"),
        TensorSpec("B", (1, d_out, rank), f"{name}.B"),
    )
    return SliceSpec(name, "lora", (0,), f"target.{name}", tensors)


LORA_SPECS = (
    lora_spec("l0", 7, 5, 2),
    lora_spec("l1", 7, 5, 2),
    slice_spec("head", 1, (1, 2, 2), "head"),
)


def write_package(
    folder: Path,
    key: PrivateKey,
    specs: tuple[SliceSpec, ...] = SPECS,
    labels: tuple[str, ...] = ("no", "yes"),
    program: bytes = b"dummy program",
) -> Path:
    """Write a signed package whose programs are dummies: the coordinator never runs them itself."""
    return hand_made.write_package(folder, key, specs, {"programs.onnx": program * 100}, labels)


class FakeDevice:
    """A device that signs like a real one and trains by a formula of its name and task."""

    def __init__(self, world: World, name: str, cap_bytes: int = CAP_BYTES) -> None:
        self.world = world
        self.name = name
        self.cap_bytes = cap_bytes
        self.specs = world.specs
        self.key = generate_key()
        self.nonces = 0
        self.device_id = ""
        #: Memory that its runtime takes before any work, as it measured it last.
        self.floor_bytes = 1 << 20
        #: Slope and curvature that it measures along the server's last step; None as an earlier release does.
        self.line: tuple[float, float] | None = (-1.0, 4.0)
        #: Whether it says that it knows how to protect what it contributes.
        self.protects = False

    def enrol(self) -> None:
        """Join with a fresh token."""
        token = self.world.admin("POST", "/v1/admin/tokens", {}).json()["token"]
        request = EnrolRequest(token, self.name, "generic", self.key.public_key)
        answer = self.world.client.post("/v1/devices/enrol", content=messages.encode(request))
        assert answer.status_code == 201, answer.text
        self.device_id = answer.json()["device_id"]

    def headers(self, method: str, path: str, body: bytes, **changed: Any) -> dict[str, str]:
        """Signature headers; ``changed`` replaces arguments of the signing call."""
        self.nonces += 1
        arguments: dict[str, Any] = {
            "device_id": self.device_id,
            "method": method,
            "path": path,
            "body": body,
            "now_s": int(self.world.clock.now_s),
            "nonce": f"{self.name}-{self.nonces:08d}",
        }
        return sign_request(self.key, **{**arguments, **changed})

    def send(self, method: str, path: str, body: bytes = b"", **more: str) -> Any:
        """A signed request."""
        headers = {**self.headers(method, path, body), **more}
        return self.world.client.request(method, path, content=body, headers=headers)

    def check_in(self) -> Any:
        """The decoded answer."""
        request = CheckInRequest("test", self.cap_bytes, self.floor_bytes, 10, protects=self.protects)
        answer = self.send("POST", "/v1/check-in", messages.encode(request))
        assert answer.status_code == 200, answer.text
        return messages.decode(answer.content, messages.CheckInResponse)  # type: ignore[arg-type]

    def task(self) -> Task | None:
        """Check in; the task if there is one."""
        answer = self.check_in()
        return messages.decode(answer.task.encode(), Task) if isinstance(answer, SignedTask) else None

    def result(self, task: Task, scale: float = 1.0, **changed: Any) -> Result:
        """A result whose delta, or report of scalars, depends on device and task only."""
        whole = task.report == "weights"
        delta = (
            delta_of(self.specs, task, self.name, scale) if whole else report_of(self.specs, task, self.name)
        )
        if measures_line(task) and self.line is not None:
            delta[LINE] = np.float32(self.line)
        data = encode_values(delta)
        result = Result(
            task_id=task.task_id,
            run_id=task.run_id,
            round=task.round,
            examples=examples_of(task),
            steps_applied=3,
            steps_skipped=0,
            mean_loss=0.5,
            seconds=1.0,
            memory=MemoryReport(100, 90, self.cap_bytes),
            change_sha256=hashlib.sha256(data).hexdigest(),
            change=data,
        )
        return msgspec.structs.replace(result, **changed)

    def deliver(self, result: Result, task_id: str | None = None) -> Any:
        """PUT a result."""
        path = f"/v1/tasks/{task_id or result.task_id}/result"
        return self.send("PUT", path, messages.encode_result(result))


class World:
    """A coordinator on a state folder whose loops do not run: the test says when a round moves."""

    def __init__(
        self,
        folder: Path,
        publisher: PrivateKey | None = None,
        specs: tuple[SliceSpec, ...] = SPECS,
        places: Places | None = None,
    ) -> None:
        self.folder = folder
        self.places = places
        self.specs = specs
        self.clock = Clock()
        #: The machine's clock, which somebody may set.
        self.wall: Callable[[], float] = self.clock
        self.publisher = publisher or generate_key()
        self.package = write_package(folder / "package", self.publisher, specs)
        self.devices: dict[str, FakeDevice] = {}
        self.start()

    def start(self) -> None:
        """Open the state folder anew; whatever was open before is dropped as by ``kill -9``."""
        self.app = create_app(self.folder / "state", places=self.places, clock=self.clock, wall=self.wall)
        self.client = TestClient(self.app, raise_server_exceptions=True)  # type: ignore[arg-type]

    @property
    def stores(self) -> Stores:
        """The state folder's handles."""
        return self.app.state.app_state.stores

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """A request with the operator's token."""
        headers = {"Authorization": f"Bearer {self.app.state.app_state.admin_token}"}
        content = b"" if body is None else json.dumps(body).encode()
        return self.client.request(method, path, content=content, headers=headers)

    def config(self, **changed: Any) -> dict[str, Any]:
        """A run configuration for the tiny package."""
        return {
            **RUN,
            "package": str(self.package),
            "publisher_key": self.publisher.public_key,
            **changed,
        }

    def create_run(self, **changed: Any) -> str:
        """Queue a run."""
        answer = self.admin("POST", "/v1/admin/runs", self.config(**changed))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["run_id"])

    def fleet(self, *names: str) -> list[FakeDevice]:
        """Enrol devices and let each check in once."""
        for name in names:
            self.devices[name] = FakeDevice(self, name)
            self.devices[name].enrol()
            self.devices[name].check_in()
        return [self.devices[name] for name in names]

    def play(self, passes: int = 1) -> None:
        """What the loop behind the API does, at the present time."""
        from coordinator.rounds.state_machine import play

        for _ in range(passes):
            play(self.stores, self.clock.now_s)

    def run(self) -> Any:
        """The newest run, as the admin API shows it."""
        return self.admin("GET", "/v1/admin/runs/latest").json()

    def round_state(self) -> str:
        """State of the newest round."""
        return str(self.run()["rounds"][-1]["state"])

    def dump(self) -> list[str]:
        """The whole database but nonces and the audit log, which a request adds to whatever comes of it."""
        passing = ('"nonces"', '"audit"')
        return [line for line in self.stores.storage.dump() if not any(name in line for name in passing)]

    def values(self) -> bytes:
        """The run's current slice values."""
        return bytes(self.admin("GET", "/v1/admin/runs/latest/slices").content)

    def work(self, devices: list[FakeDevice]) -> None:
        """One round by all devices that get a task, in the order given."""
        self.play()
        tasks = [(device, device.task()) for device in devices]
        for device, task in tasks:
            if task is not None:
                assert device.deliver(device.result(task)).json() == {"status": "counted"}
        self.play()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A fresh coordinator."""
    world = World(tmp_path)
    yield world
    world.stores.storage.close()
