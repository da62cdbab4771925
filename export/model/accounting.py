"""Every tensor of a folder, compared with the model built from its configuration before anything is computed.

A tensor is read, or of a kind that is known not to matter, or named, or it would change what the model computes: then
the folder is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from edge_runtime.errors import ModelError
from export.model.checkpoint import Checkpoint
from export.model.quantised import FLOATS, FP8_TYPE
from export.model.weight_files import listed

#: Part of encoder classes that is not exported, and that folders may lack.
UNUSED = "pooler."
#: Buffers that older releases saved; models compute them.
BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias)$")
#: Top modules of pre-training heads, in the families that transformers knows.
PRETRAINING_HEADS = frozenset(
    (
        *("cls", "lm_head", "predictions", "sop_classifier", "mlm_probability"),
        *("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        *("discriminator_predictions", "generator_predictions", "generator_lm_head"),
    )
)
LORA = re.compile(r"(^|\.)(lora_|base_layer\.|modules_to_save\.)")
#: Keys of config.json that settle a size, by the ending of a tensor's name.
CAUSES = (
    (re.compile(r"position_embeddings\.weight$|wpe\.weight$"), "max_position_embeddings"),
    (re.compile(r"(embed_tokens|word_embeddings|wte|lm_head|embed_in|embed_out)\.weight$"), "vocab_size"),
    (re.compile(r"token_type_embeddings\.weight$"), "type_vocab_size"),
    (re.compile(r"\.[kv]_proj\."), "num_key_value_heads or head_dim"),
    (re.compile(r"\.(q|o)_proj\."), "num_attention_heads or head_dim"),
    (re.compile(r"\.(mlp|intermediate|output|fc\d|ffn)\b"), "intermediate_size"),
)


@dataclass(frozen=True)
class _Built:
    """What a model built from its configuration expects: names of tensors, of modules, and of tied parameters."""

    model: PreTrainedModel
    shapes: dict[str, tuple[int, ...]]
    floating: frozenset[str]
    modules: frozenset[str]
    tied: tuple[tuple[str, ...], ...]


def account(
    folder: Path, model: PreTrainedModel, checkpoint: Checkpoint, read: Iterable[str] = ()
) -> tuple[str, ...]:
    """Compare the tensors of a folder with a model.

    Args:
        folder: model folder.
        model: model as its configuration describes it, without values.
        checkpoint: tensors of the folder, by the model's names.
        read: further tensors that are read for what is put on top of the model.

    Returns:
        A sentence about tensors that are not used, if there are such.

    Raises:
        ModelError: tensors are missing or of another shape or type, or one that the model lacks would change what it
            computes.
    """
    built = _built(model)
    _require_all(folder, built, checkpoint)
    for name in sorted(checkpoint.names & set(built.shapes)):
        _compare(folder, built, checkpoint, name)
    for names in built.tied:
        _compare_tied(folder, checkpoint, names)
    others = sorted(checkpoint.names - set(built.shapes) - set(read))
    patterns = "|".join(model._keys_to_ignore_on_load_unexpected or ())
    unknown = [
        name
        for name in others
        if not BUFFERS.search(name)
        and not (patterns and re.search(patterns, name))
        and not name.startswith(UNUSED)
    ]
    for name in unknown:
        _refuse_part(folder, built, name)
    named = [name for name in unknown if name.partition(".")[0] not in PRETRAINING_HEADS]
    if not named:
        return ()
    count = "1 tensor of the folder is" if len(named) == 1 else f"{len(named)} tensors of the folder are"
    return (f"{count} not used: {listed(named)}",)


def _built(model: PreTrainedModel) -> _Built:
    state = model.state_dict()
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return _Built(
        model,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        frozenset(name for name, tensor in state.items() if tensor.is_floating_point()),
        frozenset(name for name, _ in model.named_modules() if name),
        tuple(tuple(names) for names in groups.values()),
    )


def _require_all(folder: Path, built: _Built, checkpoint: Checkpoint) -> None:
    missing = sorted(
        names[0]
        for names in built.tied
        if not names[0].startswith(UNUSED) and not any(name in checkpoint for name in names)
    )
    if not missing:
        return
    first = missing[0]
    for stored in sorted(checkpoint.names):
        if stored.endswith(f".{first}"):
            raise ModelError(
                f"{folder} calls {first} {stored}: it was saved from a wrapped model; save the model inside (such as "
                "model.module or model._orig_mod) with save_pretrained, and export that folder"
            )
    layer = built.model.get_output_embeddings()
    if layer is not None and all(
        built.model.get_submodule(name.rpartition(".")[0]) is layer for name in missing
    ):
        raise ModelError(
            f"{folder} lacks {first}: it was saved without its output layer; set tie_word_embeddings to true in its "
            "config.json if it shares the embedding, or save it again from AutoModelForCausalLM, or export it with "
            "--task classification"
        )
    raise ModelError(
        f"{folder} lacks {len(missing)} tensors of its architecture, the first is {first}; "
        f"{_blocks_sentence(built, missing, checkpoint)}download or save the model again"
    )


def _blocks_sentence(built: _Built, missing: list[str], checkpoint: Checkpoint) -> str:
    """What to correct if the missing tensors are those of whole blocks."""
    count = getattr(built.model.config, "num_hidden_layers", None)
    held = {number for name in checkpoint.names if (number := _block(name)) is not None}
    if isinstance(count, int) and held and all(_block(name) not in (None, *held) for name in missing):
        return (
            f"config.json has num_hidden_layers {count} and the weights have {len(held)}: set it to that, or "
        )
    return ""


def _block(name: str) -> int | None:
    """Number of the block a tensor belongs to."""
    found = re.search(r"\.(\d+)\.", f".{name}")
    return None if found is None else int(found[1])


def _compare(folder: Path, built: _Built, checkpoint: Checkpoint, name: str) -> None:
    """Refuse a tensor of another shape or type than the model has."""
    if checkpoint.is_assembled(name):
        if not name.startswith(UNUSED):
            checkpoint.place(name)  # refuses with what to do
        return
    found, expected = checkpoint.described(name), built.shapes[name]
    if found.shape != expected:
        key = next((key for pattern, key in CAUSES if pattern.search(name)), "hidden_size or another size")
        raise ModelError(
            f"{found.file} holds {name} as {list(found.shape)}, and config.json makes it {list(expected)}; correct "
            f"{key} in {folder.name}/config.json, or get both from one place"
        )
    if name in built.floating and found.dtype not in FLOATS and found.dtype != FP8_TYPE:
        raise ModelError(
            f"{found.file} holds {name} in {found.dtype}, which is no float type; export the float model that it "
            "was made from"
        )


def _compare_tied(folder: Path, checkpoint: Checkpoint, names: tuple[str, ...]) -> None:
    """Refuse two names of one parameter with different values."""
    present = [name for name in names if name in checkpoint]
    for other in present[1:]:
        if not checkpoint.equal(present[0], other):
            raise ModelError(
                f"{folder} has different values for {present[0]} and {other}, which its config.json makes one; set "
                "tie_word_embeddings to false there, which is how transformers loads it"
            )


def _refuse_part(folder: Path, built: _Built, name: str) -> None:
    """Refuse a tensor that the model lacks if it belongs to a part that the model has."""
    if LORA.search(name):
        raise ModelError(
            f"{folder} holds an adapter that is not merged ({name}); merge it with peft's merge_and_unload and save "
            "the model with save_pretrained, or give the adapter's folder with --adapter"
        )
    path = name
    while path := path.rpartition(".")[0]:
        if path in built.modules:
            break
    if not path:
        return
    count, block = getattr(built.model.config, "num_hidden_layers", None), _block(name)
    if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in built.shapes:
        why = "config.json describes this layer without a bias; set the key that gives it one, such as attention_bias"
    elif isinstance(count, int) and block is not None and block >= count:
        why = (
            f"config.json has num_hidden_layers {count}; set it to the number of blocks that the weights have"
        )
    else:
        why = "config.json describes another model; get both from one place"
    raise ModelError(f"{folder} holds {name}, which its architecture does not have: {why}")
