"""A ``peft`` LoRA adapter folder, read as the starting point of a package's slices.

Only what a package can express is read: plain LoRA pairs of one rank and scale. Whatever else an adapter's
configuration switches on would change what it computes, so it is refused by name, also if this program has
never heard of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import TaskKind
from edge_runtime.package.slices import FloatArray
from export.adapters.peft_names import A_SUFFIX, B_SUFFIX, CONV1D_FAMILIES, ROOT, in_package
from export.adapters.write import CONFIG, FEATURES, HEAD_DESCRIBED, HEAD_TENSORS, WEIGHTS
from export.model.folder import require_finite
from export.model.json_file import read_json_object
from export.model.slices import SliceOptions

MAX_RANK = 1024
#: Fields that do not change what a finished adapter computes, or do so only beside another one.
NEUTRAL = frozenset(
    (
        *(
            "peft_version",
            "task_type",
            "auto_mapping",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
        ),
        *("lora_dropout", "exclude_modules", "layers_pattern", "megatron_core", "qalora_group_size"),
        *("runtime_config", "ensure_weight_tying", "eva_config"),
    )
)
#: Ways to draw the first A and B that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) change it.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_TENSOR = re.compile(rf"^{re.escape(ROOT)}\.(?P<module>.+)\.(?P<part>lora_[AB])\.weight$")


class _Settings(msgspec.Struct):
    r: Annotated[int, Meta(ge=1, le=MAX_RANK)]
    lora_alpha: Annotated[float, Meta(gt=0, le=1e6)]
    peft_type: str = "LORA"
    target_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    bias: str = "none"
    fan_in_fan_out: bool = False


@dataclass(frozen=True)
class Pair:
    """LoRA's factors of one module: A (r, in) and B (out, r); the update is scale·B·A."""

    a: FloatArray
    b: FloatArray


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: folder it was read from.
        rank: LoRA's r, the same for all pairs.
        scale: number that every B·A is multiplied by.
        pairs: factors by module name, named as in the model without a head.
        head: ``weight`` (C, H) and ``bias`` (C,) of a head for the labels that were asked for, in their order; None
            if the folder has no head.
    """

    folder: Path
    rank: int
    scale: float
    pairs: dict[str, Pair]
    head: dict[str, FloatArray] | None

    def slice_options(self, chosen: SliceOptions) -> SliceOptions:
        """Options for slices that can hold this adapter, of the kind that is chosen; for LoRA-XS with its scale."""
        return replace(
            chosen,
            rank=self.rank,
            alpha=self.scale * self.rank if chosen.kind == "lora" else chosen.alpha,
            targets=tuple(sorted(self.pairs)),
        )


@dataclass(frozen=True)
class Wanted:
    """What an adapter is to start.

    Attributes:
        architecture: ``model_type`` of the model.
        task: what the package is trained for.
        labels: label set of the package, in order; empty for a causal language model.
    """

    architecture: str
    task: TaskKind
    labels: tuple[str, ...]


def read_adapter(folder: Path, wanted: Wanted) -> Adapter:
    """Read an adapter folder.

    Args:
        folder: adapter folder, with ``adapter_config.json`` and ``adapter_model.safetensors``; if our exporter wrote
            it, perhaps with ``head.safetensors``.
        wanted: model, task and labels that the adapter is to start.

    Raises:
        ModelError: it is no adapter or not plain LoRA, or its tensors do not fit each other or the configuration.
    """
    settings = _read_settings(folder)
    if settings.fan_in_fan_out and wanted.architecture not in CONV1D_FAMILIES:
        raise ModelError(
            f"{folder / CONFIG} has fan_in_fan_out, which is for layers that {wanted.architecture} does not have; "
            "is it for another model?"
        )
    named: dict[str, dict[str, FloatArray]] = {}
    for name, value in _read_tensors(folder / WEIGHTS).items():
        match = _TENSOR.match(name)
        if match is None:
            raise ModelError(
                f"{folder / WEIGHTS} holds {name}; only {ROOT}.MODULE.{A_SUFFIX} and {B_SUFFIX} can start a package"
            )
        named.setdefault(match["module"], {})[match["part"]] = value
    _check_targets(folder, settings, tuple(named))
    names = in_package(tuple(named), wanted.architecture, wanted.task)
    divisor = (
        settings.r**0.5 if settings.use_rslora else settings.r
    )  # rsLoRA: Kalajdzievski 2023, arXiv 2312.03732
    return Adapter(
        folder=folder,
        rank=settings.r,
        scale=settings.lora_alpha / divisor,
        pairs={names[module]: _pair(folder, module, parts, settings.r) for module, parts in named.items()},
        head=_read_head(folder, wanted.labels),
    )


def _read_settings(folder: Path) -> _Settings:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} is not a peft adapter folder: it has no {CONFIG}")
    found = read_json_object(path)
    if found.get("peft_type") != "LORA":
        kind = str(found.get("peft_type"))[:40]
        raise ModelError(f"{path} is of peft type {kind}; a package can start from LORA only")
    try:
        settings = msgspec.convert(found, _Settings)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    if settings.bias != "none":
        raise ModelError(
            f"{path} trains biases (bias {settings.bias[:40]!r}); a package trains none: use bias 'none'"
        )
    start = settings.init_lora_weights
    if start not in HARMLESS_STARTS:
        raise ModelError(
            f"{path} starts from {str(start)[:40]!r}, which changes the base model; have peft convert it to plain "
            "LoRA when it saves (path_initial_model_for_weight_conversion)"
        )
    for name, value in found.items():
        if name not in NEUTRAL and name not in settings.__struct_fields__ and not _is_off(value):
            raise ModelError(
                f"{path} sets {name[:60]} to {str(value)[:60]}, which a package cannot express; train or save the "
                "adapter without it, or merge it into the model first"
            )
    return settings


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _read_tensors(path: Path) -> dict[str, FloatArray]:
    if not path.is_file():
        raise ModelError(f"{path.parent} is not a whole peft adapter folder: it has no {path.name}")
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise ModelError(f"{path} holds {name} as {tensor.dtype}; adapters are floating point")
                require_finite(f"{name} of {path}", tensor)
                found[name] = tensor.to(torch.float32).contiguous().numpy()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from error
    if not found:
        raise ModelError(f"{path} holds no tensors")
    return found


def _check_targets(folder: Path, settings: _Settings, modules: tuple[str, ...]) -> None:
    """The configuration's targets and the modules with tensors must name each other."""
    targets = settings.target_modules
    if targets is None or targets == "all-linear":
        return
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ModelError(
                f"target_modules of {folder / CONFIG} is no regular expression: {error}"
            ) from error
        unnamed = [module for module in modules if not pattern.fullmatch(module)]
        idle: list[str] = []
    else:
        unnamed = [m for m in modules if not any(_is_target(m, target) for target in targets)]
        idle = [target for target in targets if not any(_is_target(m, target) for m in modules)]
    if unnamed:
        raise ModelError(
            f"{folder / WEIGHTS} adapts {unnamed[0]}, which target_modules of {CONFIG} does not name"
        )
    if idle:
        raise ModelError(f"{folder / CONFIG} targets {idle[0]!r}, for which {WEIGHTS} has no tensors")


def _is_target(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _pair(folder: Path, module: str, parts: dict[str, FloatArray], rank: int) -> Pair:
    if len(parts) != 2:
        raise ModelError(f"{folder / WEIGHTS} has {next(iter(parts))} of {module}, but not its other factor")
    a, b = parts["lora_A"], parts["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(
            f"{folder / WEIGHTS} has A {a.shape} and B {b.shape} for {module}; rank {rank} needs ({rank}, inputs) and "
            f"(outputs, {rank})"
        )
    return Pair(a, b)


def _read_head(folder: Path, labels: tuple[str, ...]) -> dict[str, FloatArray] | None:
    """The folder's head with its rows in the order of ``labels``; None without labels, or if it has no head."""
    if not labels or not (folder / HEAD_TENSORS).is_file():
        return None
    described = read_json_object(folder / HEAD_DESCRIBED)
    theirs, features = described.get("labels"), described.get("features")
    if not isinstance(theirs, list) or features not in FEATURES.values():
        raise ModelError(
            f"{folder / HEAD_DESCRIBED} does not describe a head that 'edge-export adapter' wrote"
        )
    if len(theirs) != len(labels) or set(map(str, theirs)) != set(labels):
        raise ModelError(
            f"{folder / HEAD_DESCRIBED} is for {len(theirs)} labels that are not those of --labels; give the same "
            f"labels, or remove {HEAD_TENSORS} to start with a fresh head"
        )
    parts = _read_tensors(folder / HEAD_TENSORS)
    shapes = {name: part.shape for name, part in parts.items()}
    weight = shapes.get("weight", ())
    if len(weight) != 2 or shapes != {"weight": (len(labels), weight[1]), "bias": (len(labels),)}:
        raise ModelError(
            f"{folder / HEAD_TENSORS} must hold weight ({len(labels)}, H) and bias ({len(labels)},)"
        )
    order = [theirs.index(label) for label in labels]
    return {name: part[order] for name, part in parts.items()}
