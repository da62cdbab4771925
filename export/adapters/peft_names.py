"""How ``peft`` names what it adapts: ``base_model.model.MODULE.lora_A.weight``, MODULE as the wrapped class has it.

A package for causal language modelling names modules as ``AutoModelForCausalLM`` does
(``model.layers.0.self_attn.q_proj``), one for classification as ``AutoModel``, without what a class with a head puts
before them: its ``base_model_prefix`` (``model`` in Llama, ``bert`` in BERT).
"""

from __future__ import annotations

import re

from edge_runtime.package.manifest import Features, TaskKind

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
HEAD_TENSORS, HEAD_DESCRIBED = "head.safetensors", "head.json"
#: How a head's features are made, in words.
FEATURES: dict[Features, str] = {
    "mean": "mean of last hidden states over real tokens, divided by its root mean square",
    "first": "last hidden state of the first token, divided by its root mean square",
    "last": "last hidden state of the last real token, divided by its root mean square",
    "max": "largest of each number over hidden states of real tokens, divided by their root mean square",
}
#: Where peft puts the modules of the model it wraps.
ROOT = "base_model.model"
A_SUFFIX, B_SUFFIX = "lora_A.weight", "lora_B.weight"
#: Architectures whose layers are transformers' Conv1D, weights (in, out); peft calls that ``fan_in_fan_out``.
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt"})
#: Modules that classes with a classifier have beside the model, and the pooler, which only such classes need.
HEAD_MODULES = frozenset(
    (
        *("classifier", "score", "pre_classifier", "classification_head", "head", "pooler", "qa_outputs"),
        *("logits_proj", "sequence_summary", "summary"),
    )
)
#: Modules that predict tokens; a package for classification has none of them.
OUTPUT_MODULES = frozenset(("lm_head", "cls", "embed_out", "vocab_transform", "vocab_projector"))
#: What torch.compile, FSDP and activation checkpointing put between the names of modules.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_[AB])(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?$"
)
_SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)\.")
_BLOCK = re.compile(r"^(?:.*?\.)?(?P<tail>[^.]+\.\d+\..+)$")


def plain_name(stored: str) -> str:
    """A tensor's name as the wrapped model has it: without :data:`ROOT` and without what training tools put around it.

    DistributedDataParallel puts ``module.`` first, torch.compile and FSDP put parts of their own anywhere, and a raw
    state dict keeps the name of the adapter (``modules_to_save.default``).
    """
    name = ".".join(part for part in stored.split(".") if part not in _WRAPPERS)
    while name.startswith(("module.", f"{ROOT}.")):
        name = name.removeprefix("module.").removeprefix(f"{ROOT}.")
    return _SAVED.sub(".", name)


def factor_of(name: str) -> tuple[str, str, str | None] | None:
    """Module, factor (``lora_A`` or ``lora_B``) and adapter that a plain name speaks of; None if of no LoRA factor."""
    match = _FACTOR.match(name)
    return None if match is None else (match["module"], match["part"], match["adapter"])


def block_tail(module: str) -> str | None:
    """A module's name from the list of blocks on (``layer.0.attention.self.query``); None outside the blocks.

    Classes and folders of one architecture differ in what stands before the list, and in nothing after it.
    """
    match = _BLOCK.match(module)
    return None if match is None else match["tail"]


def is_head(module: str) -> bool:
    """Whether a module outside the blocks belongs to a classifier, by its name."""
    return bool(HEAD_MODULES & set(module.split(".")[:2]))


def is_output(module: str) -> bool:
    """Whether a module outside the blocks predicts tokens, by its name."""
    return module.split(".", maxsplit=1)[0] in OUTPUT_MODULES


def in_classifier(architecture: str) -> str:
    """What a class with a classifier puts before the names of the base model's modules, with its dot."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import MODEL_MAPPING  # noqa: PLC0415

    return f"{MODEL_MAPPING[CONFIG_MAPPING[architecture]].base_model_prefix}."


def names_of_classifier(architecture: str) -> tuple[str, ...]:
    """Names of the parameters that a class with a classifier has beside the base model's."""
    import torch  # noqa: PLC0415 - slow to import, and adapters are checked without it
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    config = CONFIG_MAPPING[architecture]()
    with torch.device("meta"):
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
    return tuple(
        name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")
    )


def in_package(modules: tuple[str, ...], architecture: str, task: TaskKind) -> dict[str, str]:
    """Map module names of an adapter to those of a package, whichever class the adapter was trained on.

    Args:
        modules: module names in the adapter, without :data:`ROOT`.
        architecture: ``model_type`` of the model. One that transformers does not know keeps its names.
        task: what the package is trained for.
    """
    # Slow to import, and names alone are told without them.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import MODEL_MAPPING  # noqa: PLC0415

    if architecture not in CONFIG_MAPPING or CONFIG_MAPPING[architecture] not in MODEL_MAPPING:
        return {module: module for module in modules}
    before = f"{MODEL_MAPPING[CONFIG_MAPPING[architecture]].base_model_prefix}."
    if task == "classification" and all(module.startswith(before) for module in modules):
        return {module: module.removeprefix(before) for module in modules}
    if task == "causal_lm" and not any(module.startswith(before) for module in modules):
        return {module: before + module for module in modules}
    return {module: module for module in modules}
