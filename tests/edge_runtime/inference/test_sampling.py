"""The next token: what may be drawn, how often, and the same for the same seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edge_runtime.inference.requests import Sampling
from edge_runtime.inference.sampling import Sampler

#: Probabilities 0.5, 0.25, 0.15, 0.1 of tokens 2, 0, 3, 1.
LOGITS = np.log(np.array([0.25, 0.1, 0.5, 0.15], np.float32))

#: Twelve draws of seed 7 at temperature 1, recorded when the sampler was written.
GOLDEN = [3, 2, 2, 2, 2, 0, 2, 0, 2, 3, 3, 0]


def draws(count: int = 4000, **settings: object) -> Counter[int]:
    """How often each token is drawn."""
    sampler = Sampler(Sampling(temperature=1.0, **settings))
    return Counter(sampler.next_token(LOGITS) for _ in range(count))


def test_without_temperature_the_most_probable_token_is_taken() -> None:
    """At temperature 0 it is always the largest logit, the first of equals, whatever the other settings say."""
    assert Sampler(Sampling(top_k=3, top_p=0.1, seed=9)).next_token(LOGITS) == 2
    assert Sampler(Sampling()).next_token(np.array([1.0, 3.0, 3.0], np.float32)) == 1


def test_tokens_come_as_often_as_they_are_probable() -> None:
    """Over 4000 draws each share is within four standard deviations of its probability."""
    found = draws(seed=1)
    for token, share in enumerate(np.exp(LOGITS)):
        assert abs(found[token] / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {2, 0}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {2}),
        ({"top_p": 0.51}, {2, 0}),
        ({"top_p": 0.76}, {2, 0, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.8}, {2, 0}),  # of the three, 0.9 of all, the first two make up 0.83
    ],
)
def test_only_what_the_limits_leave_is_drawn(settings: dict[str, object], allowed: set[int]) -> None:
    """``top_k`` and ``top_p`` leave the most probable tokens, and each of these is drawn at some time."""
    assert set(draws(**settings)) == allowed


def test_a_low_temperature_sharpens() -> None:
    """At a tenth the most probable token, twice as probable as the next, is all but always drawn."""
    sampler = Sampler(Sampling(temperature=0.1))
    assert Counter(sampler.next_token(LOGITS) for _ in range(500))[2] > 490


def test_the_same_seed_draws_the_same_tokens() -> None:
    """Two samplers of one seed agree draw by draw, on values that no version of numpy changes; others do not."""

    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.next_token(LOGITS) for _ in range(12)]

    assert drawn(7) == drawn(7) == GOLDEN
    assert drawn(8) != drawn(7)
