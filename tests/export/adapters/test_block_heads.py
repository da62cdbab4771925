"""A head over several blocks, written beside an adapter or a merged model: what loads it predicts the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prepare import prepare
from edge_runtime.package.package import Package
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol.messages import Pooling
from export.adapters.load_classifier import Classifier
from export.cli import main
from tests.export import classifiers, peft_models, tiny
from tests.export.classifiers import Alone

BLOCKS = (0, 1, 2)


def test_adapter_and_merged_model_predict_alone_what_the_package_predicts(
    exported_plain, tiny_model: Path, tmp_path: Path
) -> None:
    """From a run's file of slices, which says what its head reads, both commands write what predicts the same alone."""
    jobs, ours = [], []
    for pooling in ("mean", "max"):
        values, logits, batch = trained(exported_plain.package, pooling, tmp_path / f"prepared-{pooling}")
        slices = tmp_path / f"{pooling}.safetensors"
        slices.write_bytes(values)
        package = str(exported_plain.package.folder)
        given = ["--slices", str(slices), "--publisher-key", exported_plain.key.public_key, "--output"]
        adapter, merged = tmp_path / f"adapter-{pooling}", tmp_path / f"merged-{pooling}"
        assert main(["adapter", package, "--base-model", str(tiny_model), *given, str(adapter)]) == 0
        assert main(["merge", package, str(tiny_model), *given, str(merged)]) == 0
        jobs += [
            Alone("loader", adapter, batch, tiny.LABELS, tiny_model),
            Alone("loader", merged, batch, tiny.LABELS),
        ]
        ours += [logits, logits]
    for found, expected in zip(classifiers.predict_alone(jobs), ours, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-4)


def trained(package: Package, pooling: Pooling, folder: Path):
    """A file of slices as after a run with a head over all blocks, the package's logits with it, and their texts."""
    prepared = prepare(package.for_engine("onnxruntime"), folder, OnnxEngine(), "float", 1 << 30)
    seen = prepared.with_head(BLOCKS, pooling)
    values = peft_models.random_values(Package(package.folder, seen.manifest, package.sha256))
    batch = tiny.make_text_batch(package)
    logits = Executor(seen, OnnxEngine()).sweep(values, [batch]).logits
    return encode_values(values, seen.manifest), logits, batch


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "roberta", "llama"])
def test_the_loader_finds_what_lies_behind_each_block(family: str, tmp_path: Path) -> None:
    """Hidden states of its hooks are those that transformers gives, also where blocks share their weights.

    Of Llama transformers gives the last one only behind its final norm, and the head reads it before.
    """
    folder = classifiers.write_classifier(tmp_path / "model", family, tiny.LABELS)
    model = AutoModel.from_pretrained(folder).eval()
    given = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    layers = model.config.num_hidden_layers
    described = {"pooling": "mean", "blocks": list(range(layers + 1)), "layers": layers}
    head = {"weight": torch.zeros(3, 64 * (layers + 1)), "bias": torch.zeros(3)}
    with torch.no_grad():
        last, behind = Classifier(model, head, described).hidden_states(given)
        theirs = model(**given, output_hidden_states=True).hidden_states
    assert len(behind) == layers + 1
    count = layers if family == "llama" else layers + 1
    for ours, expected in zip(behind[:count], theirs[:count], strict=True):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(last, theirs[-1])
