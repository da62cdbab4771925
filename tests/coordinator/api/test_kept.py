"""Answers that are kept for a moment."""

from __future__ import annotations

import asyncio
from typing import Any

from coordinator.api.kept import KEPT_S, Kept


def test_an_answer_is_made_once_for_a_moment() -> None:
    """All who ask within the moment get one answer; later, or when the clock went back, it is made anew."""
    made = 0

    async def make() -> dict[str, Any]:
        nonlocal made
        made += 1
        return {"number": made}

    async def play() -> list[int]:
        kept = Kept()
        together = await asyncio.gather(*(kept.get(10.0, make) for _ in range(4)))
        later = [await kept.get(at_s, make) for at_s in (10.0 + KEPT_S / 2, 10.0 + KEPT_S, 5.0)]
        return [answer["number"] for answer in (*together, *later)]

    assert asyncio.run(play()) == [1, 1, 1, 1, 1, 2, 3]
