"""What a run trained goes back to ``peft``: the same predictions from torch and from the runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.data.batches import Batch, Tokenizer, load_rows, make_batch
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import decode_values
from tests.end_to_end.harness import Fleet, command
from tests.end_to_end.workshop import Exported, rows, write_rows


# peft asks transformers for a property by its old name (peft 0.21, transformers 5.23).
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["lora_xs", "lora"])
def test_peft_predicts_what_the_runtime_predicts(workshop, tmp_path, kind: str) -> None:
    """The adapter of a run on a float package gives the runtime's logits within 1e-3, and differs from the base."""
    exported = workshop.package(kind, "none")
    slices, adapter, model = tmp_path / "slices", tmp_path / "adapter", workshop.folder / "model"
    train(exported, tmp_path / "fleet", slices)
    done = command(
        *("export.cli", "adapter", exported.folder, "--slices", slices, "--output", adapter),
        *("--publisher-key", exported.publisher_key, "--base-model", model),
    )
    assert done.returncode == 0, done.stderr

    package = Package.open(exported.folder, exported.publisher_key)
    batch = read_batch(package, write_rows(tmp_path / "dev.jsonl", rows()[:24]))
    values = decode_values(slices.read_bytes(), package.manifest.slices)
    untrained = {name: value if name.startswith("head/") else 0 * value for name, value in values.items()}
    executor = Executor(PreparedPackage.as_stored(package), OnnxEngine(threads=1))
    ours = executor.sweep(values, [batch]).logits
    assert np.abs(ours - executor.sweep(untrained, [batch]).logits).max() > 1e-2
    assert np.abs(ours - peft_logits(model, adapter, batch)).max() < 1e-3


def train(exported: Exported, folder: Path, slices: Path) -> None:
    """Two rounds on one device; the slices' final values are fetched."""
    alone = {"devices_per_round": 1, "min_devices": 1, "min_results": 1, "rounds": 2}
    optimizer = {
        "slices": {"name": "adam", "rate": 1.5, "tau": 1e-6}
    }  # moves every number far from its start
    with Fleet(folder, exported) as fleet:
        fleet.create_run(**alone, server_optimizer=optimizer)
        fleet.add_device("ash", rows()[40:64], arithmetic="float")
        fleet.wait_until_finished()
        assert fleet.operate("run", "fetch-slices", "--output", slices).returncode == 0


def read_batch(package: Package, path: Path) -> Batch:
    """All rows of a file as one batch."""
    found = load_rows(path, package.manifest.labels)
    tokenizer = Tokenizer(package.path(package.manifest.tokenizer), package.manifest.sequence_limit)
    labels = [row.label for row in found]
    return make_batch(tokenizer.encode(found), labels, pad_token_id=package.manifest.pad_token_id)


def peft_logits(model: Path, adapter: Path, batch: Batch) -> np.ndarray:
    """Logits from ``transformers`` and ``peft`` alone, features made as head.json says."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModel

    assert "root mean square" in json.loads((adapter / "head.json").read_text())["features"]
    encoder = AutoModel.from_pretrained(model, local_files_only=True, add_pooling_layer=False).eval()
    adapted = PeftModel.from_pretrained(encoder, str(adapter))
    head = load_file(adapter / "head.safetensors")
    mask = torch.from_numpy(batch.attention_mask)
    with torch.no_grad():
        hidden = adapted(input_ids=torch.from_numpy(batch.input_ids), attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        features = pooled / pooled.square().mean(-1, keepdim=True).sqrt()
        return (features @ head["weight"].T + head["bias"]).numpy()
