"""``adapter_config.json``: which fields a package can express, and what they say of a module.

Every field is read, known not to change what a finished adapter computes, or refused by name, also if this program has
never heard of it. Whether a module is adapted, and with which rank and scale, follows peft's own rules
(``check_target_module_exists`` and ``get_pattern_key`` of peft 0.21).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from edge_runtime.errors import ModelError
from export.adapters.peft_names import CONFIG
from export.model.json_file import read_json_object
from export.model.whereabouts import elsewhere

MAX_RANK = 1024
#: The way out of what a package cannot express and a merged model can.
MERGE_FIRST = (
    "merge it into the model with peft (PeftModel.from_pretrained, merge_and_unload), save that and the tokenizer "
    "with save_pretrained, and export the saved folder without --adapter"
)
#: Fields that do not change what a finished adapter computes, or do so only beside a value that is refused.
NEUTRAL = frozenset(
    (
        *("peft_version", "auto_mapping", "revision", "inference_mode", "lora_dropout", "megatron_core"),
        *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
        *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    )
)
#: Fields that change what an adapter computes, to something that peft can merge into the model.
MERGEABLE = frozenset(
    (
        *("use_dora", "lora_bias", "trainable_token_indices", "target_parameters"),
        *("use_bdlora", "velora_config", "kasa_config"),
    )
)
#: Kinds of adapters beside LoRA that peft can merge into the model.
MERGEABLE_TYPES = frozenset(("ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "HRA", "LN_TUNING"))
#: Ways to draw the first A and B that leave the base as it is.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
#: Ways that change it, and whose adapters peft converts to plain LoRA.
CONVERTIBLE_STARTS = ("pissa", "olora", "corda", "lora_ga")
#: Modules that peft trains and saves by itself when the task has a classifier.
CLASSIFIERS = ("classifier", "score")
_Number = TypeVar("_Number", int, float)


class Settings(msgspec.Struct, frozen=True):
    """What is read of the configuration; names are peft's."""

    r: Annotated[int, Meta(ge=1, le=MAX_RANK)]
    lora_alpha: Annotated[float, Meta(gt=0, le=1e6)]
    peft_type: str = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] | None = None
    rank_pattern: dict[str, Annotated[int, Meta(ge=1, le=MAX_RANK)]] | None = None
    alpha_pattern: dict[str, Annotated[float, Meta(gt=0, le=1e6)]] | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    bias: str = "none"
    fan_in_fan_out: bool = False

    def rank(self, module: str) -> int:
        """The rank that the configuration gives a module."""
        return _of_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """The number that a module's B·A is multiplied by; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732."""
        alpha, rank = _of_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def unused_patterns(self, modules: tuple[str, ...]) -> tuple[str, ...]:
        """Keys of rank_pattern and alpha_pattern that fit none of the modules; peft passes over them in silence."""
        keys = dict.fromkeys((*(self.rank_pattern or {}), *(self.alpha_pattern or {})))
        return tuple(key for key in keys if not any(_fits_pattern(key, module) for module in modules))

    def saved_modules(self) -> tuple[str, ...]:
        """Names of modules that are saved whole: peft adds those of a classifier when it loads for such a task."""
        added = CLASSIFIERS if self.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
        return tuple(dict.fromkeys((*(self.modules_to_save or ()), *added)))

    def saves(self, module: str) -> bool:
        """Whether a module, or one that it is part of, is saved whole."""
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved_modules())

    def states_targets(self) -> bool:
        """Whether the configuration says which modules are adapted."""
        return self.target_modules is not None and self.target_modules != "all-linear"

    def adapts(self, module: str) -> bool:
        """Whether peft would adapt a module; only where :meth:`states_targets`."""
        targets = self.target_modules
        if self._excludes(module) or targets is None:
            return False
        if isinstance(targets, str):
            return re.fullmatch(targets, module) is not None
        return any(is_target(module, target) for target in targets) and self._in_layers(module)

    def _excludes(self, module: str) -> bool:
        excluded = self.exclude_modules or ()
        if isinstance(excluded, str):
            named = re.fullmatch(excluded, module) is not None
        else:
            named = any(is_target(module, name) for name in excluded)
        return named or self.saves(module)

    def _in_layers(self, module: str) -> bool:
        """Whether a module's block is one of layers_to_transform; all are where it is not given."""
        chosen = self.layers_to_transform
        if chosen is None or chosen == ():
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        # Without a pattern of the list's name, peft wants something before it.
        start = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            if match := re.match(rf"{start}{pattern}\.(?P<index>\d+)\.", module):
                return int(match["index"]) in ((chosen,) if isinstance(chosen, int) else chosen)
        return False


def is_target(module: str, target: str) -> bool:
    """Whether a name, or a dotted suffix of one, names a module."""
    return module == target or module.endswith(f".{target}")


def _fits_pattern(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _of_pattern(pattern: dict[str, _Number] | None, module: str, otherwise: _Number) -> _Number:
    return next((value for key, value in (pattern or {}).items() if _fits_pattern(key, module)), otherwise)


def read_settings(folder: Path) -> Settings:
    """Read the configuration of an adapter folder.

    Args:
        folder: adapter folder.

    Raises:
        ModelError: there is none, it is not of plain LoRA, or a value cannot be used.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a peft adapter folder: it has no {CONFIG}{elsewhere(folder, CONFIG)}"
        )
    found = read_json_object(path)
    if found.get("peft_type") != "LORA":
        kind = str(found.get("peft_type"))[:40]
        way = MERGE_FIRST if kind in MERGEABLE_TYPES else "train a LORA adapter instead"
        raise ModelError(f"{path} is of peft type {kind}; a package can start from LORA only: {way}")
    try:
        settings = msgspec.convert(found, Settings)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    if settings.bias != "none":
        raise ModelError(
            f"{path} trains biases (bias {settings.bias[:40]!r}); a package trains none: {MERGE_FIRST}"
        )
    _refuse_changed_base(path, settings.init_lora_weights)
    for name, value in found.items():
        if name not in NEUTRAL and name not in settings.__struct_fields__ and not _is_off(value):
            way = MERGE_FIRST if name in MERGEABLE else "train the adapter without it"
            raise ModelError(
                f"{path} sets {name[:60]} to {str(value)[:60]}, which a package cannot express; {way}"
            )
    if isinstance(settings.target_modules, str) and settings.layers_to_transform is not None:
        raise ModelError(
            f"{path} has layers_to_transform beside target_modules {settings.target_modules[:60]!r}, and peft loads no "
            "such adapter; list the modules by name in target_modules, or set layers_to_transform to null"
        )
    _check_patterns(path, settings)
    return settings


def _refuse_changed_base(path: Path, start: bool | str | None) -> None:
    if start in HARMLESS_STARTS:
        return
    ways = "if the model folder is that changed base, set init_lora_weights to true in the adapter's configuration"
    if str(start).startswith(CONVERTIBLE_STARTS):
        ways = (
            "have peft convert it to plain LoRA when it saves (path_initial_model_for_weight_conversion), or, "
            + ways
        )
    raise ModelError(f"{path} starts from {str(start)[:40]!r}, which changes the base model; {ways}")


def _check_patterns(path: Path, settings: Settings) -> None:
    """Refuse what is no regular expression where peft takes one."""
    texts = {"modules_to_save": settings.saved_modules()}
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(settings, field)
        texts[field] = (value,) if isinstance(value, str) else ()
    if isinstance(settings.layers_pattern, tuple):
        texts["layers_pattern"] = settings.layers_pattern
    for field in ("rank_pattern", "alpha_pattern"):
        texts[field] = tuple(getattr(settings, field) or {})
    for field, patterns in texts.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ModelError(f"{field} of {path} is no regular expression: {error}") from error


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")
