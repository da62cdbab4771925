"""What tells pages that something has happened."""

from __future__ import annotations

import asyncio

from coordinator.api.changes import LOOK_S, Changes


def test_one_look_serves_all_who_ask() -> None:
    """Those who ask in the same moment share a look; the number grows only when the database says something else."""
    looks: list[str] = []
    answers = ["a", "a", "b"]

    async def read(_: object) -> str:
        looks.append(answers[len(looks)])
        return looks[-1]

    async def play() -> list[int]:
        changes = Changes()
        numbers = list(await asyncio.gather(*(changes.look(read) for _ in range(5))))
        for _ in answers[1:]:
            changes._looked_s -= LOOK_S
            numbers.append(await changes.look(read))
        return numbers

    assert asyncio.run(play()) == [1, 1, 1, 1, 1, 1, 2]
    assert looks == answers
