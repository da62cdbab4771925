"""A ``peft`` LoRA adapter folder, read as the starting point of a package's slices.

Only what a package can express is read: plain LoRA pairs of one rank and scale. What else an adapter brings is named
(:attr:`Adapter.notes`) or refused, never dropped in silence. All that can be told from the configuration and from the
headers of the tensor files is told by :func:`check_adapter`, which needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import TaskKind
from edge_runtime.package.slices import FloatArray
from edge_runtime.slices.kinds import KINDS
from export.adapters.contents import Contents, Header, as_floats, headers, read_contents, read_values
from export.adapters.fit import StoredModel, check_layers, stored_model
from export.adapters.peft_names import (
    A_SUFFIX,
    B_SUFFIX,
    CONFIG,
    CONV1D_FAMILIES,
    FEATURES,
    HEAD_DESCRIBED,
    HEAD_TENSORS,
    ROOT,
    block_tail,
    in_package,
    is_head,
    is_output,
)
from export.adapters.settings import MERGE_FIRST, Settings, is_target, read_settings
from export.model.folder import read_config
from export.model.json_file import read_json_object

if TYPE_CHECKING:
    from torch import Tensor

    from export.slices.sliced_linear import SliceOptions

TOKENIZER = "tokenizer.json"
_BASE_LAYER = "base_layer"


@dataclass(frozen=True)
class Pair:
    """LoRA's factors of one module: A (r, in) and B (out, r); the update is scale·B·A."""

    a: FloatArray
    b: FloatArray


@dataclass(frozen=True)
class SavedHead:
    """The classifier that an adapter was trained with, as peft saved it.

    Attributes:
        task_type: peft's name of the task, ``SEQ_CLS`` for a classifier of texts; None if it is not known.
        tensors: values under their names in the class with a head: ``classifier.weight`` (C, H), ``score.weight``,
            ``classifier.dense.weight``, ``bert.pooler.dense.bias``.
        pairs: factors of layers of the head that have a pair of their own, by module name; their scale is the
            adapter's.
    """

    task_type: str | None
    tensors: dict[str, FloatArray]
    pairs: dict[str, Pair]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: folder it was read from.
        rank: LoRA's r, the same for all pairs.
        scale: number that every B·A is multiplied by.
        pairs: factors by module name, named as in the model without a head.
        head: ``weight`` (C, H) and ``bias`` (C,) of a head that our exporter wrote, for the labels that were asked
            for, in their order; None if the folder has none.
        saved_head: head that peft saved; None if the folder has none.
        notes: what the folder holds and the package does not use, a sentence each.
    """

    folder: Path
    rank: int
    scale: float
    pairs: dict[str, Pair]
    head: dict[str, FloatArray] | None
    saved_head: SavedHead | None
    notes: tuple[str, ...]

    def slice_options(self, chosen: SliceOptions) -> SliceOptions:
        """Options for slices that can hold this adapter, of the kind that is chosen; one of a pair takes its scale."""
        return replace(
            chosen,
            rank=self.rank,
            alpha=self.scale * self.rank if KINDS[chosen.kind].pair else chosen.alpha,
            targets=tuple(sorted(self.pairs)),
        )


@dataclass(frozen=True)
class Wanted:
    """What an adapter is to start.

    Attributes:
        model: folder of the model.
        architecture: ``model_type`` of the model.
        task: what the package is trained for.
        labels: label set of the package, in order; empty for a causal language model.
    """

    model: Path
    architecture: str
    task: TaskKind
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """An adapter folder that can start a package as far as headers tell.

    Attributes:
        folder: adapter folder.
        settings: configuration of the adapter.
        contents: headers of its tensors.
        rank: rank of all pairs in the blocks.
        scale: scale of all pairs in the blocks.
        blocks: modules in the blocks that have a pair.
        head: names of a classifier's tensors, and modules of it that have a pair.
        unsaid: stored tensors of the model that the file repeats, by name; they must equal the model's.
        labels: labels of a head that our exporter wrote, in its order; None if there is none.
        notes: what is not used, a sentence each.
    """

    folder: Path
    settings: Settings
    contents: Contents
    rank: int
    scale: float
    blocks: tuple[str, ...]
    head: tuple[str, ...]
    unsaid: dict[str, tuple[tuple[Path, Header], ...]]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...]


def check_adapter(folder: Path, wanted: Wanted) -> Checked:
    """Refuse an adapter folder that cannot start a package, as far as its configuration and headers tell.

    Args:
        folder: adapter folder.
        wanted: model, task and labels that the adapter is to start.

    Raises:
        ModelError: it is no adapter or not plain LoRA, its tensors do not fit each other, the configuration or the
            model, or it trains something beside slices that a package would lose.
    """
    settings, contents = read_settings(folder), read_contents(folder)
    modules = tuple(contents.factors)
    beside = tuple(module for module in modules if is_head(module) or is_output(module))
    blocks = tuple(module for module in modules if module not in beside)
    _check_pairs(folder, settings, contents)
    _check_targets(contents, settings, modules)
    if outside := [module for module in blocks if block_tail(module) is None]:
        raise ModelError(
            f"{folder} adapts {outside[0]}, which lies outside the model's blocks, and slices stand in blocks only; "
            f"{MERGE_FIRST}"
        )
    if not blocks:
        raise ModelError(f"{folder} adapts {beside[0]} and no layer of the model's blocks; {MERGE_FIRST}")
    rank, scale = _one_rank_and_scale(folder, settings, blocks)
    model = stored_model(wanted.model, wanted.architecture)
    missing: tuple[str, ...] = ()
    if "quantization_config" not in read_config(wanted.model):  # such a model is refused for itself
        missing = check_layers(folder, settings, contents, blocks, model)
    head, output, unsaid = _sort_others(contents, settings, beside, wanted, model)
    _check_saved(folder, settings, contents, model)
    labels = _labels_of_head(folder, wanted.labels)
    return Checked(
        folder=folder,
        settings=settings,
        contents=contents,
        rank=rank,
        scale=scale,
        blocks=blocks,
        head=head,
        unsaid=unsaid,
        labels=labels,
        notes=(*_notes(folder, settings, contents, wanted, head, output), *_missing(contents, missing)),
    )


def read_adapter(folder: Path, wanted: Wanted) -> Adapter:
    """Read an adapter folder.

    Args:
        folder: adapter folder, with ``adapter_config.json`` and ``adapter_model.safetensors`` or
            ``adapter_model.bin``; if our exporter wrote it, perhaps with ``head.safetensors``.
        wanted: model, task and labels that the adapter is to start.

    Raises:
        ModelError: :func:`check_adapter` refuses it, a value is not finite, or it changes a tensor of the model that
            a package takes from the model folder.
    """
    checked = check_adapter(folder, wanted)
    contents = checked.contents
    values = read_values(contents.path, _stored_names(contents))
    for name, places in checked.unsaid.items():
        _require_unchanged(contents, name, values[contents.others[name].stored], places)
    names = in_package(checked.blocks, wanted.architecture, wanted.task)
    pairs = {module: _pair(contents.factors[module], values) for module in contents.factors}
    return Adapter(
        folder=folder,
        rank=checked.rank,
        scale=checked.scale,
        pairs={names[module]: pairs[module] for module in checked.blocks},
        head=_read_head(folder, wanted.labels, checked.labels),
        saved_head=saved_head(checked, values, pairs),
        notes=checked.notes,
    )


def saved_head(checked: Checked, values: dict[str, Tensor], pairs: dict[str, Pair]) -> SavedHead | None:
    """The classifier that peft saved with an adapter: what a package's head would have to compute to go on from it.

    Args:
        checked: adapter folder.
        values: tensors of its file by stored name.
        pairs: factors of all modules.

    Returns:
        Tensors under the names they have in the class with a head, and the pairs of its layers; None if the adapter
        was trained without a head.
    """
    if not checked.head:
        return None
    contents = checked.contents
    return SavedHead(
        task_type=checked.settings.task_type,
        tensors={
            name: as_floats(values[contents.others[name].stored])
            for name in checked.head
            if name in contents.others
        },
        pairs={module: pairs[module] for module in checked.head if module in pairs},
    )


def _stored_names(contents: Contents) -> Iterable[str]:
    yield from (header.stored for parts in contents.factors.values() for header in parts.values())
    yield from (header.stored for header in contents.others.values())


def _pair(parts: dict[str, Header], values: dict[str, Tensor]) -> Pair:
    return Pair(as_floats(values[parts["lora_A"].stored]), as_floats(values[parts["lora_B"].stored]))


def _check_pairs(folder: Path, settings: Settings, contents: Contents) -> None:
    for module, parts in contents.factors.items():
        a, b, rank = parts["lora_A"].shape, parts["lora_B"].shape, settings.rank(module)
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise ModelError(
                f"{contents.path} has A {a} and B {b} for {module}; rank {rank}, which {CONFIG} gives it, needs "
                f"({rank}, inputs) and (outputs, {rank}): correct r or rank_pattern there, or save the adapter again"
            )


def _one_rank_and_scale(folder: Path, settings: Settings, modules: tuple[str, ...]) -> tuple[int, float]:
    first = settings.rank(modules[0]), settings.scale(modules[0])
    for module in modules:
        rank, scale = settings.rank(module), settings.scale(module)
        if (rank, scale) != first:
            field = "rank_pattern" if rank != first[0] else "alpha_pattern"
            raise ModelError(
                f"{folder / CONFIG} has {field}: rank {first[0]} and scale {first[1]:g} for {modules[0]}, rank {rank} "
                f"and scale {scale:g} for {module}; a package has one of each. Train with one rank and alpha, or "
                f"{MERGE_FIRST}"
            )
    return first


def _check_targets(contents: Contents, settings: Settings, modules: tuple[str, ...]) -> None:
    """Refuse a pair of a module that the configuration does not name."""
    if not settings.states_targets():
        return
    if unnamed := [module for module in modules if not settings.adapts(module)]:
        raise ModelError(
            f"{contents.path} adapts {unnamed[0]}, which target_modules of {CONFIG} does not name, or another field "
            "there leaves out, and peft would pass over it; correct the configuration"
        )


def _sort_others(
    contents: Contents, settings: Settings, beside: tuple[str, ...], wanted: Wanted, model: StoredModel
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, tuple[tuple[Path, Header], ...]]]:
    """What lies beside the pairs in the blocks: of a head, of an output layer, and repeated from the model.

    Raises:
        ModelError: a tensor fits no module, or is trained and would be lost.
    """
    head = [module for module in beside if is_head(module)]
    output = [module for module in beside if not is_head(module)]
    if output and wanted.task == "causal_lm":
        raise ModelError(
            f"{contents.path} adapts {output[0]}, the model's output layer, and slices stand in blocks only; "
            f"{MERGE_FIRST}"
        )
    unsaid: dict[str, tuple[tuple[Path, Header], ...]] = {}
    for name, header in contents.others.items():
        module = _module(name)
        if _is_foreign(name, contents):
            way = MERGE_FIRST if "lora_embedding_" in name else "save the adapter with peft's save_pretrained"
            raise ModelError(
                f"{contents.path} holds {header.stored}; only {ROOT}.MODULE.{A_SUFFIX} and {B_SUFFIX}, and modules "
                f"saved whole, can be read; {way}"
            )
        if is_head(module):
            head.append(name)
        elif is_output(module) and wanted.task == "classification":
            output.append(name)
        else:
            unsaid[name] = _same_in_model(contents, settings, name, model)
    return tuple(head), tuple(output), unsaid


def _is_foreign(name: str, contents: Contents) -> bool:
    """Whether a tensor is of another method, of peft's inner state, or of a layer that has a pair."""
    parts = name.split(".")
    if any(part.startswith("lora_") or part in ("original_module", "token_adapter") for part in parts):
        return True
    return _BASE_LAYER not in parts and _module(name) in contents.factors


def _module(name: str) -> str:
    """The module of a tensor; peft keeps what a pair stands beside as the module's ``base_layer``."""
    return name.rpartition(".")[0].removesuffix(f".{_BASE_LAYER}")


def _same_in_model(
    contents: Contents, settings: Settings, name: str, model: StoredModel
) -> tuple[tuple[Path, Header], ...]:
    """The tensors of the model that one of the adapter may repeat.

    Raises:
        ModelError: there is none, it has another shape, or the configuration says that it was trained.
    """
    header, module = contents.others[name], _module(name)
    places = model.places(f"{module}.{name.rpartition('.')[2]}")
    if not places and is_output(module):  # tied to the embedding, and stored as that alone
        places = model.beside_blocks(header.shape[1:])
    if not places:
        raise ModelError(
            f"{contents.path} holds {header.stored}, which fits no module of {model.folder}; give the model that the "
            "adapter was trained on"
        )
    same = tuple(place for place in places if place[1].shape == header.shape)
    if not same and len(header.shape) == 2 and header.shape[1:] == places[0][1].shape[1:]:
        raise ModelError(
            f"{contents.path} holds {header.stored} with {header.shape[0]} rows, and the model has "
            f"{places[0][1].shape[0]}: its vocabulary was changed. Call resize_token_embeddings({header.shape[0]}) on "
            f"the model, then {MERGE_FIRST}"
        )
    if not same:
        raise ModelError(
            f"{contents.path} holds {header.stored} {header.shape}, in {model.folder} it is {places[0][1].shape}; give "
            "the model that the adapter was trained on"
        )
    if settings.saves(module):
        raise ModelError(_trained_beside(contents, name))
    return same


def _trained_beside(contents: Contents, name: str) -> str:
    return (
        f"{contents.path} holds {contents.others[name].stored}, trained as a whole beside the pairs (modules_to_save "
        f"or save_embedding_layers), and a package would lose it; {MERGE_FIRST}"
    )


def _require_unchanged(
    contents: Contents, name: str, value: Tensor, places: Iterable[tuple[Path, Header]]
) -> None:
    """Refuse a tensor that differs from the model's own by more than the rounding of the shorter of their types."""
    for path, header in places:
        own = read_values(path, [header.stored])[header.stored]
        shorter = min(own.dtype, value.dtype, key=lambda dtype: dtype.itemsize)
        if own.to(shorter).equal(value.to(shorter)):
            return
    raise ModelError(_trained_beside(contents, name))


def _check_saved(folder: Path, settings: Settings, contents: Contents, model: StoredModel) -> None:
    """Refuse a module that the model has, the configuration says is saved, and the file lacks."""
    for named in settings.modules_to_save or ():
        held = any(is_target(part, named) for name in contents.others for part in _prefixes(name))
        if (
            not held
            and not is_head(named)
            and any(is_target(part, named) for name in model.tensors for part in _prefixes(name))
        ):
            raise ModelError(
                f"{folder / CONFIG} names {named!r} in modules_to_save, and {contents.path.name} holds nothing of it; "
                "save the adapter again, or take the name out if it was not trained"
            )


def _prefixes(name: str) -> Iterable[str]:
    """Names of the modules that a tensor is part of."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _notes(
    folder: Path,
    settings: Settings,
    contents: Contents,
    wanted: Wanted,
    head: tuple[str, ...],
    output: tuple[str, ...],
) -> Iterable[str]:
    """What the folder holds and the package does not use, a sentence each."""
    if head and wanted.task == "classification":
        if (folder / HEAD_TENSORS).is_file():
            yield f"The adapter's classifier is not used, {HEAD_TENSORS} beside it is ({', '.join(head)})"
    elif head or (wanted.task == "causal_lm" and (folder / HEAD_TENSORS).is_file()):
        names = ", ".join((*head, *((HEAD_TENSORS,) if (folder / HEAD_TENSORS).is_file() else ())))
        yield f"The adapter's classifier is not used: a language model has none ({names})"
    if output:
        yield f"The adapter's output layer is not used: a classifier has none ({', '.join(output)})"
    if contents.passed_over is not None:
        yield f"{contents.passed_over} is not used: peft takes {contents.path.name} where both are there"
    if unused := settings.unused_patterns(tuple(contents.factors)):
        yield (
            f"Keys of rank_pattern and alpha_pattern fit no adapted module, in peft as here: {', '.join(unused)}"
        )
    if settings.fan_in_fan_out and wanted.architecture not in CONV1D_FAMILIES:
        yield (
            f"fan_in_fan_out of {folder / CONFIG} is not used, in peft as here: {wanted.architecture} has no such "
            "layers"
        )
    base = settings.base_model_name_or_path
    if base and Path(base).name not in str(wanted.model.resolve()):
        yield f"The adapter says that it is for {base}; it starts on {wanted.model.name}"
    yield from _tokens_left_out(folder, wanted.model)


def _missing(contents: Contents, modules: tuple[str, ...]) -> Iterable[str]:
    if modules:
        yield (
            f"{contents.path} has no tensors of {len(modules)} layers that {CONFIG} names, the first is {modules[0]}: "
            "they stay as the model has them, in peft as here"
        )


def _tokens_left_out(folder: Path, model: Path) -> Iterable[str]:
    """A sentence if the adapter's own tokenizer has tokens that the model's has not."""
    if not ((folder / TOKENIZER).is_file() and (model / TOKENIZER).is_file()):
        return
    added, known = _added_tokens(folder / TOKENIZER), _added_tokens(model / TOKENIZER)
    if more := sorted(added.items() - known.items()):
        yield (
            f"{folder / TOKENIZER} is not used, the model's is; it lacks {len(more)} tokens of the adapter's, the "
            f"first is {more[0][0]!r}"
        )


def _added_tokens(path: Path) -> dict[str, int]:
    found: Any = read_json_object(path).get("added_tokens") or []
    return {str(token.get("content")): int(token.get("id", -1)) for token in found if isinstance(token, dict)}


def _labels_of_head(folder: Path, labels: tuple[str, ...]) -> tuple[str, ...] | None:
    """The labels of a head that our exporter wrote, in its order; None without labels, or if there is no head.

    Raises:
        ModelError: it is for other labels, or not described as ours are, or has other shapes.
    """
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
    shapes = {name: header.shape for name, header in headers(folder / HEAD_TENSORS).items()}
    weight = shapes.get("weight", ())
    if len(weight) != 2 or shapes != {"weight": (len(labels), weight[1]), "bias": (len(labels),)}:
        raise ModelError(
            f"{folder / HEAD_TENSORS} must hold weight ({len(labels)}, H) and bias ({len(labels)},)"
        )
    return tuple(map(str, theirs))


def _read_head(
    folder: Path, labels: tuple[str, ...], theirs: tuple[str, ...] | None
) -> dict[str, FloatArray] | None:
    """The folder's head with its rows in the order of ``labels``; None if it has no head."""
    if theirs is None:
        return None
    order = [theirs.index(label) for label in labels]
    parts = read_values(folder / HEAD_TENSORS, ("weight", "bias"))
    return {name: as_floats(part)[order] for name, part in parts.items()}
