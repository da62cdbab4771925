"""Load a Hugging Face folder without its weights, and give it slices and what it is trained for.

The model is built from its configuration alone; its parameters have shapes but no values. What is frozen keeps its
name from the folder, and :meth:`LoadedModel.tensor` reads it when it is needed, one tensor at a time. What is trained
is added beside it, so that the result can go back to ``peft`` under the names ``peft`` expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import Features, TaskKind, fresh_features
from export.model.accounting import UNUSED, account
from export.model.checkpoint import Checkpoint
from export.model.feed_forward import feed_forward_width
from export.model.folder import read_config, require_finite
from export.model.heads import HEAD, Classifier, Head, LanguageModel
from export.model.own_head import OwnHead, UnusableHead, classifier_of
from export.model.slices import attach_slices
from export.model.top_activations import keep_top_activations
from export.slices.kinds import TRAINED
from export.slices.sliced_linear import SlicedLinear, SliceOptions


@dataclass(frozen=True)
class _Origin:
    """Where a parameter's values come from.

    Attributes:
        name: name of the parameter in the base model.
        transposed: whether its matrix lies transposed there.
    """

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Place:
    """Where a folder keeps a parameter.

    Attributes:
        file: weight file that holds it.
        stored: name of the tensor in the file.
        transposed: whether its matrix lies transposed there.
        part: which part of the stored tensor it is, and of how many of equal rows.
    """

    file: Path
    stored: str
    transposed: bool
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for capture.

    Attributes:
        task: what the model is trained for.
        module: module to capture, a function of (input_ids, attention_mask, labels); frozen parameters have no values.
        blocks: dotted path of its list of blocks.
        architecture: ``model_type`` of the folder's configuration.
        hidden_size: values of a hidden state.
        vocabulary: rows of its input embedding.
        position_limit: longest sequence it has positions for, in tokens.
        parameters: number of parameters of the base model.
        causal: whether attention looks back only.
        sliced: dotted paths of the layers that have a slice, in the base model.
        features: how the features of its head are made; None for a causal language model.
        classifier: dotted path, in the folder's class, of its own classifier's last layer, which the head goes on from;
            None for a fresh head.
        rows: rows of that classifier in the order of the labels; empty for a fresh head.
        notes: sentences for people about tensors of the folder that are not used.
    """

    task: TaskKind
    module: Classifier | LanguageModel
    blocks: str
    architecture: str
    hidden_size: int
    vocabulary: int
    position_limit: int
    parameters: int
    causal: bool
    sliced: tuple[str, ...]
    features: Features | None
    classifier: str | None
    rows: tuple[int, ...]
    notes: tuple[str, ...]
    _checkpoint: Checkpoint
    _origins: dict[str, _Origin]
    _frozen: dict[str, dict[str, Tensor]]

    def tensor(self, name: str) -> Tensor:
        """Values of a parameter or buffer of ``module``; floats in float32, frozen ones read from the folder each time.

        Raises:
            ModelError: the folder's weights lack it, or hold a value that is not finite.
        """
        if name in self._origins:
            return self._read(self._origins[name])
        owner, _, last = name.rpartition(".")
        module = self.module.get_submodule(owner)
        if isinstance(module, SlicedLinear) and last in module.FROZEN:
            if owner not in self._frozen:
                self._frozen[owner] = module.frozen_of(self.tensor(f"{owner}.linear.weight"))
            return self._frozen[owner][last]
        value: Tensor = getattr(module, last)
        return value.detach()

    def place(self, name: str) -> Place:
        """Where the folder keeps a frozen parameter of ``module``.

        Raises:
            ModelError: the folder does not keep it as one tensor.
        """
        origin = self._origins[name]
        file, stored = self._checkpoint.place(origin.name)
        return Place(file, stored, origin.transposed, self._checkpoint.part(origin.name))

    def classifier_place(self, name: str) -> Place:
        """Where the folder keeps ``weight`` or ``bias`` of its own classifier's last layer.

        Raises:
            ModelError: the folder does not keep it as one tensor.
        """
        file, stored = self._checkpoint.place(f"{self.classifier}.{name}")
        return Place(file, stored, transposed=False)

    def own_classifier(self) -> tuple[Place, ...]:
        """All tensors of the folder's own classifier, used or not; none where its class has none.

        Raises:
            ModelError: the folder does not keep one of them as one tensor.
        """
        try:
            names = _own_head(self.module.encoder.config, causal=self.causal).tensors
        except UnusableHead:
            return ()
        places = [self._checkpoint.place(name) for name in names if name in self._checkpoint]
        return tuple(Place(file, stored, transposed=False) for file, stored in places)

    @property
    def weight_files(self) -> frozenset[Path]:
        """The folder's weight files."""
        return self._checkpoint.files

    def materialise(self) -> nn.Module:
        """The module with all its values, as an ordinary model; for comparisons with torch."""
        for owner, module in self.module.named_modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    full = f"{owner}.{name}".lstrip(".")
                    if value is None or not value.is_meta:
                        continue
                    unused = full.startswith(f"encoder.{UNUSED}") and self.features != "own"
                    loaded = torch.zeros(value.shape) if unused else self.tensor(full)
                    table[name] = (
                        nn.Parameter(loaded, requires_grad=False) if table is module._parameters else loaded
                    )
        return self.module

    def _read(self, origin: _Origin) -> Tensor:
        tensor = self._checkpoint.tensor(origin.name)
        require_finite(origin.name, tensor)
        return tensor.T.contiguous() if origin.transposed else tensor


def load_model(
    folder: Path,
    classes: int,
    options: SliceOptions,
    task: TaskKind = "classification",
    *,
    features: Features | None = None,
    rows: tuple[int, ...] = (),
    mlp_topk: int | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Build a folder's model without weights and attach slices, and a head for classification.

    A fresh head is zero; the folder's own has its values.

    Args:
        folder: model folder, with config.json and weights.
        classes: size of the label set.
        options: slices to attach.
        task: what the model is trained for; ``causal_lm`` takes it with its own output layer, frozen.
        features: how the head's features are made; None for what suits the model's attention.
        rows: for the folder's own classifier, its rows in the order of the labels; empty for the folder's order.
        mlp_topk: how many activations of each feed-forward part are kept (:mod:`export.model.top_activations`); None
            for all.
        trust_remote_code: whether Python code of the folder's own may run.

    Raises:
        UnusableHead: the folder's own classifier was asked for and cannot be trained further.
        ModelError: it is no model folder, its blocks cannot be recognised, no module matches the targets, or its
             tensors are not those of its configuration; the message says what was looked for and what was found.
    """
    base, config = _build(folder, task, trust_remote_code)
    checkpoint = Checkpoint(folder, base)
    causal = is_causal(base)
    own = _own_head(config, causal=causal) if features == "own" else None
    notes = account(folder, base, checkpoint, () if own is None else own.tensors)
    _read_buffers(base, checkpoint)
    names = {parameter: name for name, parameter in base.named_parameters()}
    tied = _names_of_tied(base)
    transposed = _as_linear_layers(base, names)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    blocks = find_blocks(base)
    sliced = attach_slices(base, blocks, options)
    if mlp_topk is not None:
        keep_top_activations(base, blocks, mlp_topk, feed_forward_width(config.to_dict()))
    arguments = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    module: Classifier | LanguageModel
    classifier = None
    if task == "causal_lm":
        if not causal:
            raise ModelError(
                f"{config.model_type} looks at what follows a token, so it cannot be trained to predict it; "
                "choose a decoder, or --task classification"
            )
        module, features = LanguageModel(base, arguments), None
    else:
        features = features or fresh_features(causal)
        if own is not None:
            classifier = own.classifier
            frozen = {parameter: name.removeprefix("model.") for name, parameter in own.named_parameters()}
            _require_frozen(set(frozen.values()), set(names.values()), checkpoint, pools=own.pools)
            names.update(frozen)
            module = Classifier(base, _trained_head(own, classes, rows, checkpoint), arguments, own)
        else:
            width = int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)
            module = Classifier(base, Head(width, classes, features), arguments)
    module.eval()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_trainable(name))
    origins = {
        name: _Origin(_present(names[parameter], tied, checkpoint), parameter in transposed)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter in names
    }
    return LoadedModel(
        task=task,
        module=module,
        blocks=f"encoder.{blocks}",
        architecture=str(config.model_type),
        hidden_size=int(config.hidden_size),
        vocabulary=int(base.get_input_embeddings().weight.shape[0]),
        position_limit=_position_limit(base, config),
        parameters=parameters,
        causal=causal,
        sliced=sliced,
        features=features,
        classifier=classifier,
        rows=rows if classifier is not None else (),
        notes=notes,
        _checkpoint=checkpoint,
        _origins=origins,
        _frozen={},
    )


def is_trainable(name: str) -> bool:
    """Whether a parameter of a loaded module belongs to a slice or the head."""
    return name.startswith(f"{HEAD}.") or name.rsplit(".", 1)[-1] in TRAINED


def is_causal(model: nn.Module) -> bool:
    """Whether attention looks back only."""
    return any(getattr(module, "is_causal", False) for module in model.modules())


def find_blocks(model: nn.Module) -> str:
    """Dotted path of the list of equal blocks that holds most of the parameters, the innermost of several.

    Raises:
        ModelError: there is no list of modules of one class.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(m) for m in module}) == 1:
            found[name] = (sum(p.numel() for p in module.parameters()), name.count("."))
    if not found:
        kinds = ", ".join(sorted({type(m).__name__ for m in model.children()}))
        raise ModelError(
            f"{type(model).__name__} has no block structure this exporter recognises: looked for a ModuleList "
            f"of blocks of one class, found only {kinds}"
        )
    return max(found, key=lambda name: found[name])


def _build(folder: Path, task: TaskKind, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    kind = AutoModelForCausalLM if task == "causal_lm" else AutoModel
    read_config(folder)
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with _parameters_without_values():
            base = kind.from_config(
                config,
                attn_implementation="eager",
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # the libraries raise nothing narrower for damaged files and unknown models
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} cannot be loaded by transformers: {reason}") from error
    return base.eval(), config


def _own_head(config: Any, *, causal: bool) -> OwnHead:
    """The frozen part of the folder's own classifier, without values."""
    with _parameters_without_values():
        model = classifier_of(
            config
        )._from_config(  # what AutoModelForSequenceClassification.from_config calls
            config, attn_implementation="eager", dtype=torch.float32
        )
    return OwnHead(model.eval(), causal=causal)


def _require_frozen(frozen: set[str], base: set[str], checkpoint: Checkpoint, *, pools: bool) -> None:
    """The folder must hold what lies between the last block and the classifier's last layer."""
    pooler = {name for name in base if name.startswith(UNUSED)} if pools else set()
    if missing := sorted(name for name in frozen | pooler if name not in checkpoint):
        raise UnusableHead(f"the weights lack {missing[0]}")


def _trained_head(own: OwnHead, classes: int, rows: tuple[int, ...], checkpoint: Checkpoint) -> Head:
    """The classifier's last layer with the folder's values, its rows in the order of the labels."""
    linear = own.linear[0]
    head = Head(linear.in_features, classes, "own", has_bias=linear.bias is not None)
    for name, parameter in head.named_parameters():
        stored = f"{own.classifier}.{name}"
        if stored not in checkpoint:
            raise UnusableHead(f"the weights lack {stored}")
        value = checkpoint.tensor(stored)
        require_finite(stored, value)
        if value.shape != parameter.shape:
            raise UnusableHead(
                f"{stored} is {tuple(value.shape)}, and {classes} labels need {tuple(parameter.shape)}"
            )
        parameter.data = value[list(rows)] if rows else value
    return head


@contextmanager
def _parameters_without_values() -> Iterator[None]:
    """Within this context, new modules get parameters that have a shape but no memory; buffers keep their values."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _as_linear_layers(model: nn.Module, names: dict[nn.Parameter, str]) -> set[nn.Parameter]:
    """Replace GPT-2's Conv1D by the linear layer it is.

    Args:
        model: model to change in place.
        names: names of parameters in the folder; those of the new weights are added.

    Returns:
        The new weights, which lie transposed in the folder.
    """
    transposed = set()
    for path, module in list(model.named_modules()):
        if not isinstance(module, Conv1D):
            continue
        inputs, outputs = module.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.bias = module.bias
        weight = linear.get_parameter("weight")
        names[weight] = names[module.get_parameter("weight")]
        transposed.add(weight)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return transposed


def _names_of_tied(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter that has several, by the first of them."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {group[0]: group for group in names.values() if len(group) > 1}


def _present(name: str, tied: dict[str, list[str]], checkpoint: Checkpoint) -> str:
    """The name under which the folder holds a parameter, of the several that a tied one has."""
    return next((other for other in tied.get(name, ()) if other in checkpoint), name)


def _read_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give buffers that a folder holds, such as statistics of a training, their values."""
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and name in checkpoint:
            buffer.data = checkpoint.tensor(name).to(buffer.dtype)


def _position_limit(model: nn.Module, config: Any) -> int:
    """Longest sequence with a position for each token; RoBERTa counts positions from after its padding id."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    return int(getattr(config, "max_position_embeddings", 512))
