"""Requests as a server hands them to the application: targets that no client has tidied, bodies read bit by bit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

import httpx

from tests.coordinator.conftest import World


def raw_request(
    world: World, method: str, target: str, headers: dict[str, str], chunks: Iterable[bytes] = ()
) -> httpx.Response:
    """The answer to a request; each chunk of the body is made when the application asks for it."""
    raw, _, query = target.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 1),
        "client": ("127.0.0.1", 2),
        "scheme": "http",
        "method": method,
        "root_path": "",
        "path": unquote(raw),
        "raw_path": raw.encode("latin-1"),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "state": {},
    }
    sent: list[Any] = []
    ended = asyncio.Event()
    bodies: Iterator[dict[str, Any]] = _messages(chunks)

    async def receive() -> Any:
        message = next(bodies, None)
        if message is not None:
            return message
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            ended.set()

    asyncio.run(world.app(scope, receive, send))  # type: ignore[arg-type]
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=content)


def _messages(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        yield {"type": "http.request", "body": chunk, "more_body": True}
    yield {"type": "http.request", "body": b"", "more_body": False}
