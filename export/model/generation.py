"""A causal language model as a module to capture that gives the next token from cached keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import DynamicCache, DynamicLayer

from edge_runtime.errors import ModelError
from export.model.folder import CONFIG
from export.model.json_file import read_json_object

#: File in which a model folder says how its texts are generated.
GENERATION_CONFIG = "generation_config.json"
MAX_STOP_TOKENS = 64


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the keys and values that each block keeps of a token.

    Attributes:
        heads: number of heads that have keys and values of their own.
        key_size: numbers of a head's key.
        value_size: numbers of a head's value.
    """

    heads: int
    key_size: int
    value_size: int


class NextToken(nn.Module):
    """The logits of the token that follows some new tokens, after tokens whose keys and values are given.

    Args:
        encoder: model with its output layer.
        arguments: further arguments of the model.
    """

    def __init__(self, encoder: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.arguments = {**arguments, "use_cache": True, "logits_to_keep": 1}

    def forward(self, input_ids: Tensor, past_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits, and what the next call is given.

        Args:
            input_ids: new tokens, (B, N).
            past_mask: ones, (B, P); they tell the number of tokens before.
            past: keys (B, heads, P, key size) and values (B, heads, P, value size) of each block in turn.

        Returns:
            ``logits`` (B, V) of the last token; then keys and values of each block in turn, (B, heads, P + N, size).
        """
        for kept in past:
            torch._check(kept.shape[2] == past_mask.shape[1])  # type: ignore[no-untyped-call]
        cache = DynamicCache()
        cache.layers = [_layer(key, value) for key, value in zip(past[::2], past[1::2], strict=True)]
        cache.layer_class_to_replicate = None
        mask = torch.cat([past_mask, torch.ones_like(input_ids)], dim=1)
        outputs = self.encoder(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, **self.arguments
        )
        kept_now = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return (outputs.logits[:, 0], *kept_now)


def _layer(key: Tensor, value: Tensor) -> DynamicLayer:
    """A block's cache that holds something already. It never forgets: masks bound what a sliding window sees."""
    layer = DynamicLayer()
    layer.keys, layer.values = key, value
    layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
    return layer


def cache_shape(encoder: nn.Module, arguments: dict[str, Any], mode: FakeTensorMode) -> CacheShape:
    """What every block keeps of a token, found by running the model on tensors without values.

    Raises:
        ModelError: the model keeps something else, or not the same in each block.
    """
    with mode, torch.no_grad():
        cache = DynamicCache()
        ids = torch.ones(2, 5, dtype=torch.long)
        try:
            encoder(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                **{**arguments, "use_cache": True, "logits_to_keep": 1},
            )
        except Exception as error:  # the model's own code runs here, and may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"the model does not generate from cached keys and values: {reason}") from error
    found = {
        CacheShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for layer in cache.layers
        if isinstance(getattr(layer, "keys", None), Tensor)
    }
    if len(found) != 1:
        raise ModelError(
            "the model does not keep keys and values of one shape in every block, which generation needs; "
            "export it without --with-generation"
        )
    return found.pop()


def stop_tokens(folder: Path, vocabulary: int) -> tuple[int, ...]:
    """Tokens that end a text, as the model folder states them; empty if it states none.

    Raises:
        ModelError: a file that states them cannot be read.
    """
    for name in (GENERATION_CONFIG, CONFIG):
        if not (folder / name).is_file():
            continue
        stated = read_json_object(folder / name).get("eos_token_id")
        listed = stated if isinstance(stated, list) else [stated]
        found = [each for each in listed if isinstance(each, int) and 0 <= each < vocabulary]
        if found:
            return tuple(dict.fromkeys(found[:MAX_STOP_TOKENS]))
    return ()
