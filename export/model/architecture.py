"""Architectures that no package can be made of, told from ``config.json`` alone."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelError

#: How many experts there are, in the words of the families that route tokens to some of them.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
#: Sizes that only a layer with a running state has.
STATES = ("state_size", "time_step_rank", "mamba_d_state", "ssm_state_size", "linear_conv_kernel_dim")
#: Families with a running state whose configurations have none of these sizes.
RECURRENT = ("rwkv", "recurrent_gemma", "xlstm")
#: Parts and sizes of what reads images or sound.
OTHER_INPUTS = ("vision_config", "audio_config", "image_size", "num_mel_bins", "conv_dim")
ENCODERS_AND_DECODERS = "an encoder (BERT, ModernBERT, DeBERTa) or a decoder (Llama, Qwen3, Phi-3)"


def check_architecture(path: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> None:
    """Refuse an architecture that cannot become a package.

    Args:
        path: file that the configuration was read from, for messages.
        config: contents of ``config.json``.
        trust_remote_code: whether Python code of the folder's own may run, which may bring architectures of its own.

    Raises:
        ModelError: the architecture has a form that no package can be made of, or the installed transformers does
            not know it.
    """
    kind = config.get("model_type")
    if reason := _form(config):
        raise ModelError(f"{path} describes {kind or 'a model'}, {reason}; choose {ENCODERS_AND_DECODERS}")
    if trust_remote_code and config.get("auto_map"):
        return
    if not isinstance(kind, str) or not kind:
        raise ModelError(
            f"{path} has no model_type, so that nothing says which architecture it is; download the folder again, or "
            "save the model with transformers' save_pretrained, which writes it"
        )
    if not _is_known(kind):
        saved = config.get("transformers_version")
        raise ModelError(
            f"{path} has model_type {kind!r}, which the installed transformers {metadata.version('transformers')} does "
            "not know"
            + (f" (the folder was saved by {saved})" if isinstance(saved, str) else "")
            + "; install a newer transformers, or choose a model of a family that this one knows"
        )


def _form(config: dict[str, Any]) -> str | None:
    """What makes a configuration one that no package can be made of, in words."""
    if config.get("is_encoder_decoder"):
        return "an encoder with a decoder (is_encoder_decoder), and a package is a single chain of blocks"
    for key, value in _entries(config, EXPERTS):
        count = max(value, default=0) if isinstance(value, list) else value
        if isinstance(count, int) and count > 1 and config.get("is_moe") is not False:
            return f"a mixture of experts ({key} is {count}), whose weights differ by token"
    if config.get("model_type") == "deberta-v2" and config.get("conv_kernel_size"):
        return "with a convolution after its first block (conv_kernel_size), so that its blocks are no chain"
    if _has_running_state(config):
        return "a recurrent or state space model, whose scan over the tokens has no tangent rule"
    # LayoutLM has channels too, and reads text all the same: it has a vocabulary.
    others = OTHER_INPUTS if "vocab_size" in config else (*OTHER_INPUTS, "num_channels")
    found = next((key for key in others if config.get(key)), None)
    return None if found is None else f"a model of images or sound ({found}), and a package reads text alone"


def _entries(config: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The values of keys, here or in a part of the configuration."""
    parts = [config, *(value for key, value in config.items() if key.endswith("_config"))]
    for part in parts:
        if isinstance(part, dict):
            yield from ((key, part[key]) for key in keys if key in part)


def _has_running_state(config: dict[str, Any]) -> bool:
    layers = config.get("layer_types")
    if isinstance(layers, list) and layers:
        return any(str(layer) in ("linear_attention", "mamba", "recurrent") for layer in layers)
    return config.get("model_type") in RECURRENT or any(config.get(key) for key in STATES)


def _is_known(kind: str) -> bool:
    """Whether the installed transformers has the architecture, told without importing it where a folder tells."""
    if has_folder(kind):
        return True
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES  # noqa: PLC0415 - takes a second

    return kind in CONFIG_MAPPING_NAMES


def has_folder(kind: str) -> bool:
    """Whether transformers has a folder of that name, as nearly all architectures do."""
    library, name = find_spec("transformers"), kind.replace("-", "_")
    places = [] if library is None else library.submodule_search_locations or []
    return name.isidentifier() and any((Path(place) / "models" / name).is_dir() for place in places)
