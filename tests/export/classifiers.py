"""Random classifiers of many families as ``transformers`` saves them, and what it predicts from a folder alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from edge_runtime.data.batches import Batch
from tests.export import tiny
from tests.vocabulary import word_pieces

SIZES = {
    "hidden_size": tiny.HIDDEN,
    "num_hidden_layers": tiny.BLOCKS,
    "num_attention_heads": tiny.HEADS,
    "intermediate_size": tiny.INNER,
    "max_position_embeddings": tiny.POSITIONS,
    "initializer_range": 0.06,
    "pad_token_id": 0,
}
#: Modules to adapt where a family's query and value have other names than most.
TARGETS = {"gpt2": ("c_attn",), "modernbert": ("Wqkv",), "mpnet": ("q", "v"), "deberta-v2": ("query_proj",)}
#: Loads folders where this project cannot be imported, and writes labels and logits (B, C) of each as JSON.
LOADS = """
import importlib.util, json, sys
for name in ("edge_runtime", "export", "coordinator", "tests"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForSequenceClassification

def by_loader(folder, base):
    spec = importlib.util.spec_from_file_location("load_classifier", folder + "/load_classifier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder, base)

def by_class(folder, base):
    model = AutoModelForSequenceClassification.from_pretrained(base or folder).eval()
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if base:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, folder).eval()
    return model, labels

found = []
for job in json.loads(sys.stdin.read()):
    model, labels = (by_loader if job["how"] == "loader" else by_class)(job["folder"], job["base"])
    logits = []
    with torch.no_grad():
        for ids in job["rows"]:
            out = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64))
            logits.append((out if job["how"] == "loader" else out.logits)[0].tolist())
    found.append({"labels": labels, "logits": logits})
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Alone:
    """A folder to be loaded without this project.

    Attributes:
        how: ``loader`` for load_classifier.py beside the weights, ``class`` for AutoModelForSequenceClassification.
        folder: merged model or adapter.
        batch: texts to predict.
        labels: labels whose order the logits get.
        base: model folder that an adapter is for; None for a merged model.
    """

    how: Literal["loader", "class"]
    folder: Path
    batch: Batch
    labels: tuple[str, ...]
    base: Path | None = None


def write_classifier(folder: Path, family: str, labels: tuple[str, ...], **changes: object) -> Path:
    """Save a random classifier whose classes are ``labels``, with a tokenizer; ``changes`` go to its configuration."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_pieces(tiny.SENTENCES, 160),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    tokenizer.save_pretrained(folder)
    sizes: dict[str, object] = {**changes, "vocab_size": len(tokenizer)}
    if family in (*tiny.DECODERS, "albert"):
        config = tiny.small_config(family, **sizes)
    elif family == "distilbert":
        shape = {"dim": tiny.HIDDEN, "n_layers": tiny.BLOCKS, "n_heads": tiny.HEADS, "hidden_dim": tiny.INNER}
        config = AutoConfig.for_model(family, **{**SIZES, **shape, **sizes})
    else:
        config = AutoConfig.for_model(family, **{**SIZES, **sizes})
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # biases start at zero, and a mistake about a zero shows nowhere
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: object) -> Path:
    """Set fields of a folder's configuration; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def predict_alone(jobs: Sequence[Alone]) -> list[np.ndarray]:
    """Logits (B, C) of each folder, all in one process that cannot import this project."""
    asked = [
        {
            "how": job.how,
            "folder": str(job.folder),
            "base": None if job.base is None else str(job.base),
            "rows": [
                ids[mask > 0].tolist()
                for ids, mask in zip(job.batch.input_ids, job.batch.attention_mask, strict=True)
            ],
        }
        for job in jobs
    ]
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADS],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logits = []
    for job, found in zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True):
        order = [found["labels"].index(label) for label in job.labels]
        logits.append(np.array(found["logits"], np.float32)[:, order])
    return logits
