"""How ``peft`` names what it adapts: ``base_model.model.MODULE.lora_A.weight``, MODULE as the wrapped class has it.

A package for causal language modelling names modules as ``AutoModelForCausalLM`` does
(``model.layers.0.self_attn.q_proj``), one for classification as ``AutoModel``, without what a class with a head puts
before them: its ``base_model_prefix`` (``model`` in Llama, ``bert`` in BERT).
"""

from __future__ import annotations

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from edge_runtime.package.manifest import TaskKind

#: Where peft puts the modules of the model it wraps.
ROOT = "base_model.model"
A_SUFFIX, B_SUFFIX = "lora_A.weight", "lora_B.weight"
#: Architectures whose layers are transformers' Conv1D, weights (in, out); peft calls that ``fan_in_fan_out``.
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt"})


def in_classifier(architecture: str) -> str:
    """What a class with a classifier puts before the names of the base model's modules, with its dot."""
    return f"{MODEL_MAPPING[CONFIG_MAPPING[architecture]].base_model_prefix}."


def names_of_classifier(architecture: str) -> tuple[str, ...]:
    """Names of the parameters that a class with a classifier has beside the base model's."""
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
    if architecture not in CONFIG_MAPPING or CONFIG_MAPPING[architecture] not in MODEL_MAPPING:
        return {module: module for module in modules}
    before = f"{MODEL_MAPPING[CONFIG_MAPPING[architecture]].base_model_prefix}."
    if task == "classification" and all(module.startswith(before) for module in modules):
        return {module: module.removeprefix(before) for module in modules}
    if task == "causal_lm" and not any(module.startswith(before) for module in modules):
        return {module: before + module for module in modules}
    return {module: module for module in modules}
