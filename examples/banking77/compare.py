"""Does the adapter, loaded by ``peft`` into the float model, predict what the runtime predicts?"""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.data.batches import Tokenizer, load_rows, make_batch
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prepare import prepare
from edge_runtime.package.package import Package
from edge_runtime.package.slices import decode_values
from export.lowering.quiet import quiet

with quiet():
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModel
    from transformers.utils import logging

BATCH = 32
logging.disable_progress_bar()


@dataclass(frozen=True)
class Agreement:
    """How the runtime and ``peft`` agree on the dev rows.

    Attributes:
        agreement: share of rows for which both predict the same label.
        runtime_accuracy: share of rows for which the runtime is right.
        peft_accuracy: share of rows for which ``peft`` is right.
    """

    agreement: float
    runtime_accuracy: float
    peft_accuracy: float


def compare_with_peft(
    model: Path, adapter: Path, package_folder: Path, publisher_key: str, slices: Path, dev: Path
) -> Agreement:
    """Predict the dev rows with the runtime (int8 base) and with peft (float base), and compare.

    Args:
        model: Hugging Face folder of the float base.
        adapter: adapter folder that ``edge-export adapter`` wrote.
        package_folder: package of the quantised base.
        publisher_key: public key that the package is signed with.
        slices: file of trained slices.
        dev: rows to predict.
    """
    package = Package.open(package_folder, publisher_key)
    rows = load_rows(dev, json.loads((adapter / "head.json").read_text())["labels"])
    tokenizer = Tokenizer(package.path(package.manifest.tokenizer), package.manifest.sequence_limit)
    ids = tokenizer.encode(rows)
    values = decode_values(slices.read_bytes(), package.manifest.slices)
    engine = OnnxEngine(threads=2)
    with tempfile.TemporaryDirectory() as folder:  # mapped files outlive their names
        executor = Executor(prepare(package, Path(folder) / "prepared", engine), engine)
    encoder = AutoModel.from_pretrained(model, local_files_only=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers has renamed
        adapted = PeftModel.from_pretrained(encoder, str(adapter))
    head = load_file(adapter / "head.safetensors")

    ours, theirs = np.empty(len(rows), int), np.empty(len(rows), int)
    order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
    for start in range(0, len(rows), BATCH):
        group = order[start : start + BATCH]
        batch = make_batch(
            [ids[i] for i in group],
            [rows[i].label for i in group],
            pad_token_id=package.manifest.pad_token_id,
        )
        ours[group] = executor.sweep(values, [batch]).logits.argmax(axis=1)
        mask = torch.from_numpy(batch.attention_mask)
        with torch.no_grad():
            hidden = adapted(
                input_ids=torch.from_numpy(batch.input_ids), attention_mask=mask
            ).last_hidden_state
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            features = pooled / pooled.square().mean(-1, keepdim=True).sqrt()
            theirs[group] = (features @ head["weight"].T + head["bias"]).argmax(1).numpy()
    labels = np.array([row.label for row in rows])
    return Agreement(
        agreement=float((ours == theirs).mean()),
        runtime_accuracy=float((ours == labels).mean()),
        peft_accuracy=float((theirs == labels).mean()),
    )
