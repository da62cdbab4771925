"""Requests at random, signed and not: nothing is answered with a 5xx, and what is refused has changed nothing.

EDGE_FUZZ_REQUESTS sets how many; ``make test-faults`` sends 20,000.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import CheckInRequest, DeviceEvent, EnrolRequest
from tests.coordinator.api.raw import raw_request
from tests.coordinator.api.test_access import RIGHTS
from tests.coordinator.conftest import FakeDevice, World
from tests.edge_runtime.test_decoding import NASTY

REQUESTS = int(os.environ.get("EDGE_FUZZ_REQUESTS", "600"))
WORDS = ("latest", "a", "t", "0" * 64, "..", "%00", "%ff", "%0a", "a b", "é", "9" * 400, "\\", "*", "")
VALUES = (
    *(
        None,
        True,
        -1,
        0,
        1 << 63,
        (1 << 64) - 1,
        1e308,
        -0.0,
        "",
        "x" * 3000,
        "\n",
        "a\n",
        "\u0000",
        "0" * 64,
    ),
    *([], {}, [[]], {"": 0}, "\U0001f600"),
)


def some_body(source: random.Random, device: FakeDevice, task: messages.Task) -> bytes:
    """A message of some kind, whole or with a field or some bytes changed; or no message at all."""
    kinds: tuple[Any, ...] = (
        CheckInRequest("test", 1 << 30, 1 << 20, 10),
        EnrolRequest("t" * 20, "x", "c", device.key.public_key),
        DeviceEvent("hot", "71 degrees", None),
        device.result(task),
        {"valid_s": 5.0},
        device.world.config(),
    )
    table = msgspec.to_builtins(source.choice(kinds), builtin_types=(bytes,))
    for _ in range(source.randrange(3)):
        table[source.choice([*table, "other"])] = source.choice(VALUES)
    pack = source.random() < 0.4 or any(isinstance(value, bytes) for value in table.values())
    body = (msgspec.msgpack if pack else msgspec.json).encode(table)
    choice = source.random()
    if choice < 0.2:
        return source.choice(NASTY)
    if choice < 0.5:
        place = source.randrange(len(body) + 1)
        return body[:place] + source.randbytes(source.randrange(5)) + body[place + source.randrange(3) :]
    return body


def some_target(source: random.Random, path: str, task: messages.Task) -> str:
    """The address of a route, filled in with something."""
    for name in ("task_id:str", "sha256:str", "run_id:str", "name:str", "path:str"):
        word = source.choice((task.task_id, task.state, *WORDS))
        path = path.replace(f"{{{name}}}", quote(word, safe="%"))
    path = path.replace("{offset:int}", source.choice(("0", "5", "-1", "9" * 40, "x")))
    if source.random() < 0.1:
        path = source.choice(("/" + path, path + "/", path.upper(), path.replace("/", "%2f")))
    if source.random() < 0.1:
        path += source.choice(
            ("?after=-1", "?after=" + "9" * 40, "?limit=x", "?", "?after=1&after=2", "?%ff=%00")
        )
    return path


def some_headers(
    source: random.Random, device: FakeDevice, method: str, target: str, body: bytes
) -> dict[str, str]:
    """Headers that speak for a device, for the operator, for nobody, or not quite for one of them."""
    who = source.random()
    if who < 0.35:
        headers = device.headers(method, "/" + target.partition("?")[0].lstrip("/"), body)
    elif who < 0.75:
        headers = {"Authorization": f"Bearer {device.world.app.state.app_state.admin_token}"}
    else:
        headers = {}
    if source.random() < 0.2:
        name = source.choice((*headers, "Content-Length", "Range", "Content-Type", "Host", "Authorization"))
        headers[name] = source.choice(("", "x", "\xff", "-1", "9" * 30, "bytes=-", "bytes=9-1", "a" * 2000))
    return headers


def test_no_request_breaks_the_coordinator(tmp_path: Path) -> None:
    """Whatever comes, no answer is a 5xx, and after one that is a refusal the database is what it was."""
    world = World(tmp_path)
    device, *_ = world.fleet("a", "b")
    world.create_run()
    world.play()
    task = device.task()
    assert task is not None
    source = random.Random(7)
    routes = list(RIGHTS)
    found: Counter[int] = Counter()
    before = world.dump()
    for _ in range(REQUESTS):
        method, path = source.choice(routes).split(" ", 1)
        if source.random() < 0.1:
            method = source.choice(("GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH"))
        target = some_target(source, path, task)
        body = b"" if method == "GET" and source.random() < 0.9 else some_body(source, device, task)
        headers = some_headers(source, device, method, target, body)
        answer = raw_request(world, method, target, headers, [body])
        found[answer.status_code] += 1
        assert answer.status_code < 500, (method, target, headers, body[:200], answer.content)
        after = world.dump()
        if answer.status_code >= 400:
            assert after == before, (method, target, headers, body[:200], answer.content)
        before = after
    print(f"{REQUESTS} requests at random: {dict(sorted(found.items()))}")
    assert found[200] and found[400] and found[401]
    world.stores.storage.close()
