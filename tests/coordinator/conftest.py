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

from coordinator.api.app import create_app
from coordinator.storage.stores import Stores
from edge_runtime.package.manifest import (
    FORMAT_VERSION,
    Base,
    FileEntry,
    Manifest,
    Program,
    Segment,
    SelfCheck,
    SizeTerm,
    SliceSpec,
    TensorSpec,
    Variant,
)
from edge_runtime.package.slices import encode_values, shapes
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
from edge_runtime.training.line import LINE, measures_line

CAP_BYTES = 1 << 30
#: A row of data that fits the package, as a file.
ROW = '{"text": "a", "label": "yes"}\n'
RUN: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "rounds": 2,
    "devices_per_round": 2,
    "split": "cyclic",
    "min_devices": 2,
    "min_results": 1,
    "steps": 3,
    "batch_size": 4,
    "selection_timeout_s": 10.0,
    "deadline_s": 60.0,
    "poll_min_s": 0.3,
    "poll_max_s": 0.6,
    "max_abandoned": 2,
}


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


def slice_spec(name: str, segment: int, shape: tuple[int, ...], kind: str = "lora_xs") -> SliceSpec:
    """A slice with one tensor named ``core``."""
    tensors = (TensorSpec("core", shape, f"{name}.core"),)
    return SliceSpec(name, kind, (segment,), f"target.{name}", tensors)  # type: ignore[arg-type]


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


def initial_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, but ones for s1 and random numbers for an A."""
    if name.endswith("/A"):
        return np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return np.full(shape, name == "s1/core", np.float32)


def write_package(folder: Path, key: PrivateKey, specs: tuple[SliceSpec, ...] = SPECS) -> Path:
    """Write a signed package whose programs are dummies: the coordinator never runs them itself."""
    folder.mkdir()
    initial = {name: initial_value(name, shape) for name, shape in shapes(specs).items()}
    files = {
        "programs.onnx": b"dummy program" * 100,
        "probe.onnx": b"another dummy",
        "tokenizer.json": b"{}",
        "slices.safetensors": encode_values(initial),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    variant = Variant("programs.onnx", (), live=((SizeTerm(64.0, 1, 1, 0),),))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        task="classification",
        labels=("no", "yes"),
        sequence_limit=16,
        pad_token_id=0,
        base=Base("bert", "by hand", 100, 4, "none"),
        files={name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
        programs={"p": Program(("hidden",), ("hidden",), {"float": variant})},
        segments=(Segment("embed", "p", "p", "p", {}), Segment("head", "p", "p", "p", {})),
        slices=specs,
        tokenizer="tokenizer.json",
        initial_state="slices.safetensors",
        self_checks={"float": SelfCheck(1, 0.0, 0.0, 1.0)},
        probe="probe.onnx",
    )
    data = messages.encode(manifest)
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_text(key.sign(data))
    return folder


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
        request = CheckInRequest("test", self.cap_bytes, self.floor_bytes, 10)
        answer = self.send("POST", "/v1/check-in", messages.encode(request))
        assert answer.status_code == 200, answer.text
        return messages.decode(answer.content, messages.CheckInResponse)  # type: ignore[arg-type]

    def task(self) -> Task | None:
        """Check in; the task if there is one."""
        answer = self.check_in()
        return messages.decode(answer.task.encode(), Task) if isinstance(answer, SignedTask) else None

    def result(self, task: Task, scale: float = 1.0, **changed: Any) -> Result:
        """A result whose delta depends on device and task only."""
        names = {*task.slices, *(("head",) if task.train_head else ())}
        generator = np.random.default_rng([task.round, task.slot, *self.name.encode()])
        delta = {
            f"{spec.name}/{tensor.name}": (scale * generator.standard_normal(tensor.shape)).astype(np.float32)
            for spec in self.specs
            for tensor in spec.tensors
            if spec.name in names and not (task.freeze_a and tensor.name == "A")
        }
        if measures_line(task) and self.line is not None:
            delta[LINE] = np.float32(self.line)
        data = encode_values(delta)
        result = Result(
            task_id=task.task_id,
            run_id=task.run_id,
            round=task.round,
            examples=4 + task.slot,
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
        self, folder: Path, publisher: PrivateKey | None = None, specs: tuple[SliceSpec, ...] = SPECS
    ) -> None:
        self.folder = folder
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
        self.app = create_app(self.folder / "state", clock=self.clock, wall=self.wall)
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
        """The whole database but the nonces, which a verified request uses up whatever comes of it."""
        return [line for line in self.stores.storage.dump() if '"nonces"' not in line]

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
