"""Whether an adapter fits a model folder, told from the headers of both."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ModelError
from export.adapters.contents import Contents, Header, headers
from export.adapters.peft_names import CONFIG, CONV1D_FAMILIES, block_tail
from export.adapters.settings import MERGE_FIRST, Settings, is_target
from export.model.folder import read_config
from export.model.weight_files import find_weights

#: Architectures whose folders name layers otherwise than their classes do; transformers renames them as it loads. Its
#: table of names needs torch, so that whether an adapter fits them is told when the model is built.
RENAMED_FAMILIES = frozenset(("gte", "nomic_bert", "jina_embeddings_v3"))
_INDEX = re.compile(r"^(?P<blocks>[^.]+)\.(?P<index>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class StoredModel:
    """The tensors of a model folder, by the names it stores them under.

    Attributes:
        folder: model folder.
        tensors: file and header by stored name.
        layers: inputs and outputs of every layer of the blocks, by name from the list of blocks on; several where
            the folder has several lists of one name.
        renamed: whether the model's class calls its layers otherwise than the folder.
    """

    folder: Path
    tensors: dict[str, tuple[Path, Header]]
    layers: dict[str, set[tuple[int, int]]]
    renamed: bool = False

    def places(self, name: str) -> list[tuple[Path, Header]]:
        """Where a tensor lies that another class of this model may call by a longer or shorter name."""
        return [
            place
            for stored, place in self.tensors.items()
            if is_target(stored, name) or is_target(name, stored)
        ]

    def beside_blocks(self, row: tuple[int, ...]) -> list[tuple[Path, Header]]:
        """Where the tables outside the blocks lie whose rows have a shape, the longest first."""
        found = [
            place
            for name, place in self.tensors.items()
            if block_tail(name) is None and place[1].shape[1:] == row and len(place[1].shape) == 2
        ]
        return sorted(found, key=lambda place: -place[1].shape[0])


def stored_model(folder: Path, architecture: str) -> StoredModel:
    """Read the headers of a model folder's weights.

    Args:
        folder: model folder.
        architecture: ``model_type`` of its configuration.

    Raises:
        ModelError: there are no weights, or a file is damaged.
    """
    tensors: dict[str, tuple[Path, Header]] = {}
    for file in find_weights(folder, read_config(folder)).files:
        tensors.update({name: (file, header) for name, header in headers(file).items()})
    layers: dict[str, set[tuple[int, int]]] = {}
    for name, (_, header) in tensors.items():
        tail = block_tail(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if tail is not None and len(header.shape) == 2:
            first, second = header.shape
            sides = (first, second) if architecture in CONV1D_FAMILIES else (second, first)
            layers.setdefault(tail, set()).add(sides)
    return StoredModel(folder, tensors, layers, architecture in RENAMED_FAMILIES)


def check_layers(
    folder: Path, settings: Settings, contents: Contents, modules: Iterable[str], model: StoredModel
) -> tuple[str, ...]:
    """Refuse an adapter whose pairs cannot belong to the layers of a model.

    A layer that the folder stores under another name than the model class has is left for later, when the model is
    built.

    Args:
        folder: adapter folder.
        settings: configuration of the adapter.
        contents: tensors of the adapter.
        modules: adapted modules in the blocks.
        model: tensors of the model folder.

    Returns:
        Layers of the model that the configuration names and that have no pair.

    Raises:
        ModelError: the model has no such layers, fewer blocks, or layers of other sides; or a name among the targets
            has no pair at all.
    """
    if model.renamed:
        return ()
    base = settings.base_model_name_or_path
    source = f"its base_model_name_or_path is {base}; " if base else ""
    tails = {module: block_tail(module) or module for module in modules}
    kinds = {_kind(tail) for tail in model.layers}
    for module, tail in tails.items():
        if tail in model.layers:
            _check_sides(folder, contents, module, model, source)
        elif _kind(tail) in kinds or not model.layers.keys() & set(tails.values()):
            raise ModelError(
                f"{folder} adapts {module}, and {model.folder} has no such layer; {source}give the model that the "
                "adapter was trained on"
            )
    return _missing(folder, settings, contents, tails, model) if settings.states_targets() else ()


def _kind(tail: str) -> str:
    """A layer's name without the number of its block."""
    match = _INDEX.match(tail)
    return tail if match is None else f"{match['blocks']}.{match['rest']}"


def _check_sides(folder: Path, contents: Contents, module: str, model: StoredModel, source: str) -> None:
    a, b = (contents.factors[module][part].shape for part in ("lora_A", "lora_B"))
    wanted, found = (a[1], b[0]), model.layers[block_tail(module) or module]
    if wanted not in found:
        inputs, outputs = min(found)
        raise ModelError(
            f"{folder} adapts {module} with A {a} and B {b}, a layer of {wanted[0]} inputs and {wanted[1]} outputs; in "
            f"{model.folder} it has {inputs} and {outputs}; {source}give the model that the adapter was trained on"
        )
    if a[0] > min(wanted):
        raise ModelError(
            f"{folder} adapts {module} with rank {a[0]}, above the smaller side of the layer, {min(wanted)}, which a "
            f"slice cannot have; {MERGE_FIRST}"
        )


def _missing(
    folder: Path, settings: Settings, contents: Contents, tails: dict[str, str], model: StoredModel
) -> tuple[str, ...]:
    """The model's layers that the configuration names and that have no pair.

    Raises:
        ModelError: a name among the targets has no pair at all.
    """
    before = sorted({module.removesuffix(tail) for module, tail in tails.items()})
    lists = {tail.split(".", maxsplit=1)[0] for tail in tails.values()}
    named = [
        start + tail for tail in model.layers if tail.split(".", maxsplit=1)[0] in lists for start in before
    ]
    missing = tuple(module for module in named if settings.adapts(module) and module not in tails)
    targets = settings.target_modules
    for target in targets if isinstance(targets, tuple) else ():
        if any(is_target(module, target) for module in missing) and not any(
            is_target(module, target) for module in contents.factors
        ):
            raise ModelError(
                f"{folder / CONFIG} targets {target!r}, for which {contents.path.name} has no tensors; save the "
                "adapter again, or take the name out of target_modules if it was not trained"
            )
    return missing
