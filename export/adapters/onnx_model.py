"""A merged classifier as one ONNX file, which any ONNX Runtime runs without torch, transformers or this project.

The folder is what ``edge-export merge`` writes: with a head of its own beside the weights, which ``load_classifier.py``
there loads, or with a classifier that transformers has a class for. The file takes ``input_ids`` and ``attention_mask``
(texts, tokens), int64, and gives ``logits`` (texts, labels). Beside it are ``tokenizer.json``, as the ``tokenizers``
library reads it, and ``labels.json`` with the labels in the order of the logits.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForSequenceClassification

from edge_runtime.durable import rename_durably
from edge_runtime.errors import ModelError
from export.adapters.load_classifier import load
from export.adapters.peft_names import HEAD_DESCRIBED
from export.model.folder import read_config

MODEL, TOKENIZER, LABELS = "model.onnx", "tokenizer.json", "labels.json"
#: Largest size of the parameters in one file: the format's messages end at 2 GiB.
MOST_BYTES = 2_000_000_000
#: Sizes (texts, tokens) on which the file is compared with torch, and the largest difference relative to the logits.
SIZES, TOLERANCE = ((1, 3), (3, 8), (2, 11)), 1e-3


def write_onnx(folder: Path, output: Path) -> Path:
    """Write ``model.onnx``, the tokenizer and the labels into a new folder, or nothing.

    Args:
        folder: merged model folder.
        output: folder to create.

    Raises:
        ModelError: ``output`` exists, the folder holds no classifier or no tokenizer, the model is too large for one
            file or cannot be translated, or ONNX Runtime does not give torch's logits.
    """
    if output.exists():
        raise ModelError(f"{output} exists already; choose another --output or remove it")
    if not (folder / TOKENIZER).is_file():
        raise ModelError(
            f"{folder} has no {TOKENIZER}; give a folder that edge-export merge wrote, or save its tokenizer there "
            "with transformers' save_pretrained"
        )
    model, labels = _classifier(folder)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > MOST_BYTES:
        raise ModelError(
            f"the model has {size} bytes of parameters, and one ONNX file holds at most {MOST_BYTES}; load {folder} "
            "with torch instead"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".onnx-") as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        _translate(model, made / MODEL)
        _compare(model, made / MODEL, len(labels))
        shutil.copyfile(folder / TOKENIZER, made / TOKENIZER)
        (made / LABELS).write_text(json.dumps(labels, ensure_ascii=False), "utf-8")
        rename_durably(made, output)
    return output


class _Logits(torch.nn.Module):
    """A model of transformers' own class, of whose outputs only the logits are wanted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (texts, labels)."""
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def _classifier(folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """The folder's classifier in evaluation mode, and its labels in the order of its logits."""
    if (folder / HEAD_DESCRIBED).is_file():
        try:
            return load(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder} cannot be loaded: {error}; merge again") from error
    names = read_config(folder).get("architectures") or ["no class"]
    if not str(names[0]).endswith("ForSequenceClassification"):
        raise ModelError(
            f"{folder} holds no classifier ({names[0]}, and no {HEAD_DESCRIBED}); give a folder that edge-export merge "
            "wrote for a package with labels"
        )
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return _Logits(model), [model.config.id2label[index] for index in range(model.config.num_labels)]


def _example(texts: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random texts, all but the first of them padded on the right."""
    generator = torch.Generator().manual_seed(texts)
    ids = torch.randint(0, vocabulary, (texts, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, tokens - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _vocabulary(model: torch.nn.Module) -> int:
    """Number of tokens that the model has embeddings of; both kinds of classifier hold one of transformers' models."""
    inner: Any = model.model
    return int(inner.config.vocab_size)


def _translate(model: torch.nn.Module, path: Path) -> None:
    """Write the model as one file; its sizes of texts and tokens stay open."""
    sides = {0: "texts", 1: "tokens"}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                kwargs=_example(2, 7, _vocabulary(model)),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": sides, "attention_mask": sides},
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(
            f"torch cannot translate the model to ONNX: {str(error).splitlines()[0]}; load the folder with torch "
            "instead"
        ) from error
    if program is None:
        raise ModelError("torch.onnx.export gave no program; load the folder with torch instead")
    program.save(str(path), external_data=False)


def _compare(model: torch.nn.Module, path: Path, labels: int) -> None:
    """Run the file in ONNX Runtime on texts of several sizes, beside torch."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for texts, tokens in SIZES:
        given = _example(texts, tokens, _vocabulary(model))
        with torch.no_grad():
            wanted = model(**given).numpy()
        got = session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})[0]
        if got.shape != (texts, labels):
            raise ModelError(f"the ONNX file gives logits {got.shape} for {texts} texts and {labels} labels")
        difference = float(np.abs(got - wanted).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            raise ModelError(
                f"ONNX Runtime's logits differ from torch's by {difference:.2g} on {texts} texts of {tokens} tokens; "
                "load the folder with torch instead"
            )
