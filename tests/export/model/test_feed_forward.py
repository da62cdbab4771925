"""How wide feed-forward parts are, by config.json alone."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.errors import ConfigError
from export.model.feed_forward import check_kept, feed_forward_width


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"intermediate_size": 1536, "hidden_size": 384}, 1536),
        ({"ffn_dim": 3072}, 3072),
        ({"hidden_dim": 3072, "dim": 768}, 3072),
        ({"d_ff": 1024}, 1024),
        ({"n_embd": 768, "n_inner": None}, 3072),
        ({"n_embd": 768, "n_inner": 512}, 512),
        ({"n_embd": 768}, None),
        ({"intermediate_size": [4, 4]}, None),
    ],
)
def test_the_width_is_found_under_each_name(config: dict[str, Any], width: int | None) -> None:
    """Families call the width differently, GPT-2 leaves it open, and what does not tell gives none."""
    assert feed_forward_width(config) == width


def test_what_no_part_has_is_refused_in_one_line() -> None:
    """Below one, and above the width where that is known; the limits are named."""
    check_kept(1536, {"intermediate_size": 1536})
    check_kept(9999, {})
    for kept in (0, -3, 1537):
        with pytest.raises(ConfigError, match=rf"--mlp-topk is {kept}, must be from 1 to 1536, the width"):
            check_kept(kept, {"intermediate_size": 1536})
    with pytest.raises(ConfigError, match="from 1 to as many as a feed-forward part has"):
        check_kept(0, {})
