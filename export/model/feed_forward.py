"""How wide the feed-forward parts of a model's blocks are, as its config.json tells it; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_runtime.errors import ConfigError

#: Keys of config.json with the number of activations of a feed-forward part, by how families call it.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff")
#: GPT-2's parts are this many times as wide as its states where config.json leaves their width open.
TIMES = 4


def feed_forward_width(config: Mapping[str, Any]) -> int | None:
    """Number of activations of each feed-forward part; None if the configuration does not tell."""
    for key in WIDTHS:
        if isinstance(config.get(key), int) and not isinstance(config[key], bool):
            return int(config[key])
    states = config.get("n_embd")
    return TIMES * states if "n_inner" in config and isinstance(states, int) else None


def check_kept(kept: int, config: Mapping[str, Any]) -> None:
    """Refuse a number of kept activations that no feed-forward part has.

    Raises:
        ConfigError: it is below 1, or above the width that the configuration tells.
    """
    width = feed_forward_width(config)
    if kept < 1 or (width is not None and kept > width):
        most = "as many as a feed-forward part has" if width is None else f"{width}, the width of its parts"
        raise ConfigError(f"--mlp-topk is {kept}, must be from 1 to {most}")
