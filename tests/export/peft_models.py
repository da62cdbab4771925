"""What ``peft`` and ``transformers`` alone make of an adapter, and adapters that ``peft`` itself wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from edge_runtime.data.batches import NOT_PREDICTED, Batch
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.package.manifest import TaskKind
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values, decode_values, shapes

#: peft asks transformers for a property by its old name (peft 0.21, transformers 5.23).
OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def base_model(folder: Path, task: TaskKind = "classification", **options: Any) -> Any:
    """The folder's model as an adapter's user loads it."""
    kind = AutoModelForCausalLM if task == "causal_lm" else AutoModel
    return kind.from_pretrained(folder, local_files_only=True, attn_implementation="eager", **options).eval()


def write_random_adapter(model: Any, folder: Path, **settings: Any) -> Path:
    """An adapter of random A and B, written by peft for a model."""
    torch.manual_seed(13)
    get_peft_model(model, LoraConfig(init_lora_weights=False, **settings)).save_pretrained(folder)
    return folder


def predict(model: Any, head: Path | None, batch: Batch) -> np.ndarray:
    """Logits (B, C) with a head's folder, features made as head.json says; without one, losses (B,) of next tokens."""
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask)
        if head is None:
            labels = torch.from_numpy(batch.labels)
            losses = torch.nn.functional.cross_entropy(
                out.logits.transpose(1, 2), labels, ignore_index=NOT_PREDICTED, reduction="none"
            )
            return (losses.sum(1) / (labels != NOT_PREDICTED).sum(1)).numpy()
        parts = load_file(head / "head.safetensors")
        described = json.loads((head / "head.json").read_text())["features"]
        if described.startswith("mean of last hidden states over real tokens"):
            pooled = (out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            assert described.startswith("last hidden state of the last real token")
            pooled = out.last_hidden_state[torch.arange(len(ids)), mask.sum(1) - 1]
        features = pooled / pooled.square().mean(-1, keepdim=True).sqrt()
        return (features @ parts["weight"].T + parts["bias"]).numpy()


def load_adapter(model: Any, folder: Path) -> Any:
    """A model with an adapter, as peft loads it."""
    return PeftModel.from_pretrained(model, str(folder)).eval()


def run(package: Package, values: Values, batch: Batch) -> np.ndarray:
    """What the package computes: logits, or losses of next tokens."""
    sweep: Sweep = Executor(PreparedPackage.as_stored(package), OnnxEngine(threads=1)).sweep(values, [batch])
    return sweep.loss if package.manifest.task == "causal_lm" else sweep.logits


def initial(package: Package) -> Values:
    """The values a run starts from."""
    return decode_values(package.path(package.manifest.initial_state).read_bytes(), package.manifest.slices)


def random_values(package: Package, size: float = 0.2) -> Values:
    """Values of every slice, as after a long run."""
    generator = np.random.default_rng(5)
    return {
        name: (size * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes(package.manifest.slices).items()
    }
