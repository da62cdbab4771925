"""Rounds with masked contributions: the sum of the plain integers to the bit, whoever falls out or is killed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load

from coordinator.aggregation.closed_form import solve
from coordinator.rounds.deltas import of_vector
from coordinator.rounds.state_machine import resume
from edge_runtime.agent.masked_round import MaskedRound
from edge_runtime.errors import RefusedError, UnreachableError
from edge_runtime.masking.participant import take_part
from edge_runtime.package.slices import Values, decode_values, encode_values
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    MaskingOver,
    MaskingStage,
    MaskingWait,
    Refusal,
    ResultReceipt,
    RevealedShares,
    SealedShares,
    Task,
)
from edge_runtime.training.feature_sums import decode_sums, form_of
from edge_runtime.training.protected import layout_of, protect
from edge_runtime.training.replay import SCALARS, STEPS
from tests.coordinator.conftest import FakeDevice, World
from tests.coordinator.rounds.test_private_rounds import private_fleet
from tests.coordinator.rounds.test_state_machine import holders
from tests.coordinator.rounds.test_visits import VISIT, sums

KEY = bytes(32)
NAMES = ("a", "b", "c", "d", "e")
MASKED: dict[str, Any] = {
    "devices_per_round": 5,
    "min_devices": 5,
    "min_results": 3,
    "split": "whole",
    "secure_aggregation": True,
    "rounds": 1,
    "poll_min_s": 1.0,
    "poll_max_s": 2.0,
}


class MaskedDevice:
    """The real agent's part in a masked round, over the in-memory coordinator."""

    def __init__(self, device: FakeDevice, task: Task) -> None:
        self.device, self.task = device, task
        self.folder = device.world.folder / f"masked-{device.name}"
        self.folder.mkdir(exist_ok=True)
        self.sent: list[bytes] = []
        #: Stage at which it falls silent; empty for none.
        self.silent_at = ""

    def hand_in(self, contribution: bytes) -> None:
        """Keep the contribution, and hand its keys in."""
        self.contribution = contribution
        keys = MaskedRound(self.folder).begin(self.task, self.device.key, contribution)
        result = self.device.result(
            replace(self.task, train_head=False, slices=()),
            change=b"",
            change_sha256=hashlib.sha256(b"").hexdigest(),
            examples=1,
            mean_loss=None,
            masking=keys,
        )
        answer = self.device.deliver(result)
        assert answer.json() == {"status": "counted"}, answer.text

    def go_on(self) -> float | None:
        """What the agent does in a turn; each time from the files alone, as after a kill."""
        return MaskedRound(self.folder).go_on(self)  # type: ignore[arg-type]

    def masking_stage(self, task_id: str) -> MaskingStage:
        """See :class:`edge_runtime.agent.client.Client`."""
        answer = self.device.send("GET", f"/v1/tasks/{task_id}/masking")
        if answer.status_code != 200:
            refusal = messages.decode(answer.content, Refusal)
            raise RefusedError(refusal.message, code=refusal.code)
        return messages.decode(answer.content, MaskingStage)  # type: ignore[arg-type]

    def put_masking(
        self, task_id: str, what: str, body: bytes | SealedShares | RevealedShares
    ) -> ResultReceipt:
        """See :class:`edge_runtime.agent.client.Client`."""
        if what == self.silent_at:
            raise UnreachableError("silent")
        data = body if isinstance(body, bytes) else messages.encode(body)
        self.sent.append(data)
        answer = self.device.send("PUT", f"/v1/tasks/{task_id}/masking/{what}", data)
        if answer.status_code != 200:
            refusal = messages.decode(answer.content, Refusal)
            raise RefusedError(refusal.message, code=refusal.code)
        return messages.decode(answer.content, ResultReceipt)


def begin(world: World, change_of: Callable[[FakeDevice, Task], bytes] | None = None) -> list[MaskedDevice]:
    """A round whose devices have trained and handed in their keys."""
    world.play()
    found = []
    for device, task in holders(world):
        masked = MaskedDevice(world.devices[device.name], task)
        change = device.result(task).change if change_of is None else change_of(device, task)
        manifest = world.stores.manifest(task.package, task.features, task.pooling)
        masked.hand_in(protect(task, manifest, change, 4 + task.slot, KEY))
        found.append(masked)
    return found


def play_on(world: World, devices: list[MaskedDevice], *, passes: int = 12, restart: bool = False) -> None:
    """Let coordinator and devices go on in turns; silent ones never answer again."""
    for _ in range(passes):
        world.play()
        if restart:
            world.stores.storage.close()
            world.start()
            resume(world.stores, world.clock.now_s)
        for device in devices:
            try:
                device.go_on()
            except UnreachableError:
                continue
        if all(world.round_state() != state for state in ("selecting", "collecting", "aggregating")):
            return


def expected_mean(devices: list[MaskedDevice]) -> np.ndarray:
    """The weighted mean by the plain integers that the devices had."""
    total = sum(np.frombuffer(device.contribution, "<i4").astype(np.int64) for device in devices)
    protection = devices[0].task.protection
    assert protection is not None
    assert isinstance(total, np.ndarray)
    return total[:-1] * protection.quantum / (total[-1] / protection.largest)


def moved(world: World, before: Values, vector: np.ndarray, task: Task) -> Values:
    """The values moved by a vector."""
    delta = of_vector(world.stores.manifest(task.package), task, before, vector)
    return {name: before[name] + delta[name] if name in delta else before[name] for name in before}


def initial(world: World, task: Task) -> Values:
    return decode_values(world.stores.blobs.get(task.state), world.specs)


@pytest.mark.parametrize("silent_at", ["", "shares", "vector", "reveal"])
@pytest.mark.parametrize("restart", [False, True])
def test_the_values_move_by_the_sum_of_the_plain_integers(
    world: World, silent_at: str, restart: bool
) -> None:
    """Whoever falls out at whichever stage, and however often the coordinator is killed: the same final bits."""
    private_fleet(world, *NAMES)
    world.create_run(**MASKED)
    devices = begin(world)
    before = initial(world, devices[0].task)
    devices[1].silent_at = silent_at
    play_on(world, devices, passes=4, restart=restart)
    if silent_at:
        for _ in range(4):
            world.clock.now_s += 100.0
            play_on(world, devices, passes=3, restart=restart)
    assert world.round_state() == "committed", world.run()["rounds"]
    contributed = [d for d in devices if not (d is devices[1] and silent_at in ("shares", "vector"))]
    wanted = moved(world, before, expected_mean(contributed), devices[0].task)
    assert world.values() == encode_values(wanted)
    assert all(device.go_on() is None for device in devices if device is not devices[1])
    assert not (devices[0].folder / "masking.part").exists()


def test_the_coordinator_has_no_contribution_by_itself(world: World) -> None:
    """Nothing that a device sends is its contribution, and what came is forgotten with the round."""
    private_fleet(world, *NAMES)
    world.create_run(**MASKED)
    devices = begin(world)
    play_on(world, devices)
    for device in devices:
        plain = np.frombuffer(device.contribution, "<i4")
        (vector,) = [data for data in device.sent if len(data) == len(device.contribution)]
        assert (np.frombuffer(vector, "<i4") == plain).mean() < 0.3
        assert all(device.contribution not in data for data in device.sent)
    dump = "\n".join(world.dump())
    assert "INSERT INTO masked_answers" not in dump.replace('"', "")
    (entry,) = world.run()["rounds"]
    assert (entry["train_loss"], entry["examples"], entry["scores"]) == (None, 0, {})


def test_scalars_are_replayed_from_their_sum(world: World) -> None:
    """Devices share directions, so the sum of their scalars makes the sum of their changes."""
    private_fleet(world, *NAMES)
    world.create_run(**MASKED, report="scalars", directions="shared", steps=2, draws=3, batch_size=4)

    def scalars(device: FakeDevice, task: Task) -> bytes:
        generator = np.random.default_rng(list(device.name.encode()))
        report = {SCALARS: generator.standard_normal((2, 3, 1)).astype(np.float32), STEPS: np.float32([0, 1])}
        head = {
            name: np.full(shape, 0.25, np.float32)
            for name, shape in layout_of(task, world.stores.manifest(task.package)).tensors.items()
            if name != SCALARS
        }
        return encode_values({**report, **head})

    devices = begin(world, scalars)
    before = initial(world, devices[0].task)
    assert {device.task.direction_slot for device in devices} == {0}
    assert len({device.task.slot for device in devices}) == 5
    play_on(world, devices)
    assert world.round_state() == "committed"
    wanted = moved(world, before, expected_mean(devices), devices[0].task)
    assert world.values() == encode_values(wanted)
    # and that is the weighted mean of what each report would have made by itself
    layout = layout_of(devices[0].task, world.stores.manifest(devices[0].task.package))
    weights = np.minimum(np.array([4 + device.task.slot for device in devices]) / 8, 1.0)
    means = {name: np.zeros(array.shape) for name, array in before.items()}
    for device, weight in zip(devices, weights, strict=True):
        report = report_of(scalars(device.device, device.task), layout.tensors)
        own = of_vector(world.stores.manifest(device.task.package), device.task, before, report)
        for name, delta in own.items():
            means[name] += weight * delta / weights.sum()
    for name, mean in means.items():
        assert wanted[name] - before[name] == pytest.approx(mean, abs=1e-5), name
    assert any(mean.any() for name, mean in means.items() if not name.startswith("head/"))


def report_of(data: bytes, tensors: Any) -> np.ndarray:
    """A report as a vector."""
    loaded = load(data)
    return np.concatenate([loaded[name].astype(np.float64).ravel() for name in tensors])


def test_a_head_is_solved_from_masked_sums(world: World) -> None:
    """Sums for a head in closed form add up masked, and give the head of the plain sums."""
    private_fleet(world, *NAMES)
    world.create_run(**{**MASKED, **VISIT}, ridge=0.1)
    devices = begin(world, lambda device, task: sums(device, task).change)
    play_on(world, devices)
    assert world.round_state() == "committed"
    task = devices[0].task
    manifest = world.stores.manifest(task.package, task.features, task.pooling)
    form, plain = form_of(task, manifest), None
    for device in devices:
        each = decode_sums(sums(device.device, task).change, form)
        plain = each if plain is None else plain.plus(each)
    assert plain is not None
    head = decode_values(world.values(), manifest.slices)
    assert head["head/weight"] == pytest.approx(solve(plain, 0.1).weight, rel=1e-4, abs=1e-6)


def test_noise_by_the_server_goes_onto_the_masked_sum(world: World) -> None:
    """With both, devices clip, the coordinator sees the sum alone, and divides it by the places."""
    private_fleet(world, *NAMES)
    world.create_run(**MASKED, privacy={"noise_multiplier": 1e-5, "clip_norm": 0.5})
    devices = begin(world)
    before = initial(world, devices[0].task)
    play_on(world, devices)
    assert world.round_state() == "committed"
    total = sum(np.frombuffer(device.contribution, "<i4").astype(np.int64) for device in devices)
    protection = devices[0].task.protection
    assert protection is not None
    assert isinstance(total, np.ndarray)
    wanted = moved(world, before, total[:-1] * protection.quantum / 5, devices[0].task)
    after = decode_values(world.values(), world.specs)
    assert all(np.abs(after[name] - wanted[name]).max() < 1e-3 for name in after)
    assert world.run()["privacy"]["epsilon"] > 0


def test_too_few_that_are_left_lose_the_round_and_not_the_run(world: World) -> None:
    """A round with too few contributions is abandoned with both numbers; the next one begins anew."""
    private_fleet(world, *NAMES)
    world.create_run(**MASKED)
    devices = begin(world)
    for device in devices[:3]:
        device.silent_at = "vector"
    for _ in range(4):
        play_on(world, devices, passes=3)
        world.clock.now_s += 100.0
    first = world.run()["rounds"][0]
    assert first["state"] == "abandoned"
    assert first["reason"] == "2 devices of at least 3 contributed"
    assert "masked_answers VALUES" not in "\n".join(world.dump())
    for device in NAMES:
        world.devices[device].check_in()
    again = begin(world)
    play_on(world, again)
    assert world.round_state() == "committed"


def test_answers_that_do_not_belong_are_refused_and_change_nothing(world: World) -> None:
    """Wrong lengths, wrong devices, a second answer and one out of turn: a code each, and the round goes on."""
    private_fleet(world, *NAMES)
    world.create_run(**MASKED)
    devices = begin(world)
    first, other = devices[0], devices[1].device
    path = f"/v1/tasks/{first.task.task_id}/masking"
    assert isinstance(first.masking_stage(first.task.task_id), MaskingWait)
    assert first.device.send("PUT", f"{path}/vector", b"1234").json()["code"] == "stale"
    world.play(2)
    before = world.dump()
    assert other.send("GET", path).json()["code"] == "not_your_task"
    assert first.device.send("PUT", f"{path}/vector", b"1234").json()["code"] == "stale"
    empty = messages.encode(SealedShares(()))
    assert first.device.send("PUT", f"{path}/shares", empty).json()["code"] == "bad_shares"
    assert first.device.send("PUT", f"{path}/shares", b"{}").status_code == 400
    assert world.dump() == before
    for device in devices:
        device.go_on()
    assert first.device.send("PUT", f"{path}/shares", empty).json()["code"] == "conflict"
    assert first.device.send("PUT", f"{path}/shares", first.sent[0]).json() == {"status": "duplicate"}
    world.play()
    assert first.device.send("PUT", f"{path}/vector", b"1234").json()["code"] == "bad_vector"
    play_on(world, devices)
    assert world.round_state() == "committed"
    assert isinstance(first.masking_stage(first.task.task_id), MaskingOver)


def test_a_result_that_could_be_read_is_not_taken(world: World) -> None:
    """A task to be masked takes keys alone, signed by its device; a plain one takes none."""
    private_fleet(world, *NAMES)
    world.create_run(**MASKED)
    world.play()
    (device, task), (other, _), *_ = holders(world)
    answer = device.deliver(device.result(task))
    assert (answer.status_code, answer.json()["code"]) == (422, "not_masked")
    _, foreign = take_part(task, other.key)
    empty = {"change": b"", "change_sha256": hashlib.sha256(b"").hexdigest(), "examples": 1}
    bare = replace(task, slices=(), train_head=False)
    answer = device.deliver(device.result(bare, **empty, masking=foreign))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_keys")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"min_results": 2}, "min_results = 2 must be 3 at least"),
        ({"robust_mean": "median"}, "robust_mean"),
        ({"norm_limit": 30.0}, "norm_limit = 30"),
        ({"buffer_size": 4}, "buffer_size"),
        ({"gate_variance": 1.0}, "gate_variance"),
        ({"normalise_steps": True}, "normalise_steps"),
        ({"split": "cyclic"}, "split"),
        ({"report": "scalars", "local_optimizer": {"name": "adamw"}}, "not linear"),
        ({"server_optimizer": {"slices": {"rate": "auto"}}, "directions": "shared"}, "rate"),
    ],
)
def test_what_looks_at_single_contributions_is_refused(
    world: World, changed: dict[str, Any], words: str
) -> None:
    """One line says what does not go with masks; nothing is stored."""
    before = world.dump()
    answer = world.admin("POST", "/v1/admin/runs", world.config(**{**MASKED, **changed}))
    assert answer.status_code == 422
    assert words in answer.json()["message"]
    assert world.dump() == before


def test_no_later_run_goes_on_from_sums_that_were_masked(world: World) -> None:
    """Nobody could take a device's sums off again, so such a run is refused."""
    private_fleet(world, *NAMES)
    run_id = world.create_run(**{**MASKED, **VISIT})
    devices = begin(world, lambda device, task: sums(device, task).change)
    play_on(world, devices)
    world.play(2)
    plain = {**MASKED, "secure_aggregation": False, **VISIT, "continue_from": run_id}
    answer = world.admin("POST", "/v1/admin/runs", world.config(**plain))
    assert answer.status_code == 422
    assert "masked or noised" in answer.json()["message"]
