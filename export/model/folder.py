"""Whether a Hugging Face folder can be exported at all, told from its files alone, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ModelError
from export.model.architecture import check_architecture
from export.model.json_file import read_json_object
from export.model.label_map import read_id2label
from export.model.quantised import refuse_quantised
from export.model.remote_code import check_code
from export.model.tokenizer_files import check_tokenizer_files
from export.model.weight_files import find_weights, read_headers, size_note, why_foreign
from export.model.whereabouts import elsewhere

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
#: What transformers writes for a model that was never given labels.
UNNAMED_LABELS = ("LABEL_0", "LABEL_1")


def check_model_folder(
    folder: Path, labels: tuple[str, ...], *, trust_remote_code: bool = False
) -> tuple[str, ...]:
    """Refuse a folder that cannot become a package for these labels.

    Args:
        folder: model folder.
        labels: label set; empty for a causal language model.
        trust_remote_code: whether the operator lets the folder's own Python code run.

    Returns:
        Sentences for people: what is not read, and what files say differently without harm.

    Raises:
        ModelError: no configuration, code of its own, an architecture that no package can be made of, weights that are
            incomplete or quantised, a tokenizer that does not fit them, or a label map of another size.
        ConfigError: a library is missing with which transformers loads the weights.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is no folder; name the model's folder, with config.json, weights and tokenizer"
            f"{elsewhere(folder, CONFIG)}"
        )
    if (
        not (folder / CONFIG).is_file()
        and not elsewhere(folder, CONFIG)
        and (foreign := why_foreign(folder)) is not None
    ):
        raise ModelError(foreign)
    config = read_config(folder)
    code = check_code(folder, config, trust_remote_code=trust_remote_code)
    check_architecture(folder / CONFIG, config, trust_remote_code=trust_remote_code)
    _check_labels(folder, config, labels)
    weights = find_weights(folder, config)
    tensors = {} if weights.pickled else read_headers(weights)
    refuse_quantised(folder, config, tensors)
    _refuse_adapter(folder)
    size = size_note(weights, tensors.values())
    notes = (*code, *weights.notes, *((size,) if size is not None else ()))
    return (*notes, *check_tokenizer_files(folder, config, tensors))


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as a dict; :class:`ModelError` if there is none."""
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} is not a Hugging Face model folder: it has no {CONFIG}{elsewhere(folder, CONFIG)}"
        )
    return read_json_object(folder / CONFIG)


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that holds a NaN or an infinity.

    Args:
        name: name of the weight in its folder.
        tensor: values of the weight.

    Raises:
        ModelError: some values are not finite; the message counts them.
    """
    if not tensor.is_floating_point():
        return
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    if wrong:
        raise ModelError(
            f"weight {name} holds {wrong} values that are not finite, of {tensor.numel()}; "
            "the folder is damaged, or its training diverged: get the model again"
        )


def _refuse_adapter(folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        raise ModelError(
            f"{folder} holds a peft adapter beside the model ({ADAPTER}), which transformers would load with it; move "
            f"{ADAPTER} and the adapter's weights to a folder of their own, and name that with --adapter if it is meant"
        )


def _check_labels(folder: Path, config: dict[str, Any], labels: tuple[str, ...]) -> None:
    if not labels:
        return
    named = read_id2label(config, folder / CONFIG)
    if not named or named == UNNAMED_LABELS:
        return
    if len(named) != len(labels):
        raise ModelError(
            f"{folder / CONFIG} names {len(named)} labels (id2label) and --labels has {len(labels)}; give the "
            "model's own, or remove id2label and label2id there if it shall learn others"
        )
