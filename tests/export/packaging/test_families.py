"""Parity of model families: loss and jvp of exported programs against torch, and the loss against transformers' own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prefix_cache import PrefixCache
from edge_runtime.package.manifest import Features, TaskKind
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import decode_values, shapes
from export.autodiff.dual import ZERO, DualInterpreter, Tangent
from export.model.heads import NOT_PREDICTED, Head
from export.quantisation.stored import StoredModel
from tests.export import tiny

#: More families, without programs: the graphs that would be lowered, run on pairs of value and tangent. Family, task,
#: the default targets that are found, and what differs from the family's tiny model.
GRAPHS: dict[str, tuple[str, TaskKind, tuple[str, ...], dict[str, object]]] = {
    "mpnet": ("mpnet", "classification", ("attention.attn.q", "attention.attn.v"), {}),
    "modernbert": ("modernbert", "classification", ("attn.Wqkv",), {}),
    "xlm-roberta": ("xlm-roberta", "classification", ("attention.self.query", "attention.self.value"), {}),
    "deberta-v2": (
        "deberta-v2",
        "classification",
        ("attention.self.query_proj", "attention.self.value_proj"),
        {"share_att_key": False, "norm_rel_ebd": "none", "position_biased_input": True, "type_vocab_size": 2},
    ),
    # One stored matrix for query, key and value, and one for both halves of the feed-forward layer.
    "gte": ("gte", "classification", ("self_attn.q_proj", "self_attn.v_proj"), {}),
    "nomic": ("nomic_bert", "classification", ("self_attn.q_proj", "self_attn.v_proj"), {}),
    # Sentence models: plain encoders whose folders state the pooling.
    "bge": ("bert", "classification", ("attention.self.query", "attention.self.value"), {}),
    "e5": ("xlm-roberta", "classification", ("attention.self.query", "attention.self.value"), {}),
    "phi3": ("phi3", "causal_lm", ("self_attn.qkv_proj",), {}),
    "gemma3": ("gemma3_text", "causal_lm", ("self_attn.q_proj", "self_attn.v_proj"), {}),
    "smollm": (
        "llama",
        "causal_lm",
        ("self_attn.q_proj", "self_attn.v_proj"),
        {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}
#: Poolings that modules.json states, and the features that a head gets.
POOLED: dict[str, tuple[str, Features]] = {"bge": ("cls", "first"), "e5": ("mean", "mean")}
#: Family, task, how many programs: embedding, block as primal, entry and dual, head as primal and dual; a family
#: whose blocks attend differently has a second kind of block.
PARITY: tuple[tuple[str, TaskKind, int], ...] = (
    ("albert", "classification", 6),
    ("distilbert", "classification", 6),
    ("roberta", "classification", 6),
    ("llama", "classification", 6),
    ("llama", "causal_lm", 6),
    ("mistral", "causal_lm", 6),
    ("qwen2", "causal_lm", 6),
    ("qwen2-sliding", "causal_lm", 9),
    ("qwen3", "causal_lm", 6),
    ("opt", "causal_lm", 6),
    ("gpt2", "causal_lm", 6),
    ("deberta-v2", "classification", 6),
)
#: Float arithmetic differs from torch's by the order of additions only.
LIMIT = 1e-4


def family_model(folder: Path, family: str, task: TaskKind) -> Path:
    """A random model; ``-sliding`` has a window in its second block alone."""
    name, _, sliding = family.partition("-")
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} if sliding else {}
    return tiny.write_model(folder, name, task, **changes)


def state_pooling(folder: Path, mode: str) -> None:
    """What sentence-transformers writes beside a model."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    named = [
        {"idx": place, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(named))
    (folder / "1_Pooling").mkdir()
    switch = "pooling_mode_cls_token" if mode == "cls" else "pooling_mode_mean_tokens"
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({switch: True}))


def own_loss(
    model: Path, task: TaskKind, batch: dict[str, torch.Tensor], pooled: Features = "mean"
) -> torch.Tensor:
    """The loss of each example by the model as transformers loads and runs it; encoders are pooled as is asked."""
    kind = AutoModelForCausalLM if task == "causal_lm" else AutoModel
    loaded = kind.from_pretrained(model).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        if task == "classification":
            hidden = loaded(**inputs).last_hidden_state
            features = "last" if loaded.config.model_type in tiny.DECODERS else pooled
            head = Head(hidden.shape[-1], len(tiny.LABELS), features)
            generator = torch.Generator().manual_seed(0)
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
            return head(hidden, batch["attention_mask"], batch["labels"])[0]
        logits = loaded(**inputs).logits
    labels = torch.where(batch["labels"] < 0, -100, batch["labels"])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses.sum(1) / (labels >= 0).sum(1)


@pytest.fixture(scope="module")
def export_family(tmp_path_factory) -> Callable[[str, TaskKind], tuple[Path, tiny.Exported]]:
    """Model and float package of a family; each is made once, when first asked for."""

    @cache
    def export(family: str, task: TaskKind) -> tuple[Path, tiny.Exported]:
        folder = tmp_path_factory.mktemp(family)
        model = family_model(folder / family, family, task)
        labels = tiny.LABELS if task == "classification" else ()
        return model, tiny.export(model, folder / "out", task=task, labels=labels, quantisation="none")

    return export


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task", "programs"), PARITY, ids=str)
def test_a_family_agrees_with_torch(export_family, family: str, task: TaskKind, programs: int) -> None:
    """Loss and jvp of the programs are torch's, equal blocks share programs, and the loss is the model's own."""
    model, exported = export_family(family, task)
    check = exported.package.manifest.self_checks["float"]
    assert max(check.loss, check.jvp) < LIMIT
    assert check.segments == len(exported.package.manifest.segments)
    assert len(exported.package.manifest.programs) == programs

    batch = tiny.torch_batch(tiny.make_text_batch(exported.package))
    slices = {}
    if task == "classification":
        weight = exported.reference.tensors["head.weight"]
        slices["head.weight"] = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = exported.reference.run(batch, slices)["loss"]
    torch.testing.assert_close(found, own_loss(model, task, batch), rtol=1e-4, atol=1e-5)


def forward_mode(
    stored: StoredModel,
    batch: dict[str, torch.Tensor],
    slices: dict[str, torch.Tensor],
    dots: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (B,) and jvps (K, B) by the segments' graphs, on pairs of value and tangent."""
    tensors = stored.in_memory()
    flow: dict[str, tuple[torch.Tensor, Tangent]] = {name: (value, ZERO) for name, value in batch.items()}
    for segment in stored.segments:
        given = [flow[name] for name in segment.values]
        given += [
            (slices.get(source, tensors[source]), dots.get(source, ZERO))
            for source in segment.slices.values()
        ]
        given += [(tensors[source], ZERO) for source in segment.weights.values()]
        results = DualInterpreter(segment.module()).run_dual(*map(list, zip(*given, strict=True)))
        flow.update(zip(segment.outputs, results, strict=True))
    loss, jvps = flow["loss"]
    assert isinstance(jvps, torch.Tensor)
    return loss, jvps


@pytest.mark.parametrize("name", GRAPHS)
def test_a_familys_graphs_agree_with_torch(tmp_path: Path, name: str) -> None:
    """Query and value are found, jvps of each example are backpropagation's, and the loss is the model's own."""
    family, task, targets, changes = GRAPHS[name]
    model = tiny.write_model(tmp_path / name, family, task, **changes)
    mode, pooled = POOLED.get(name, ("", "mean"))
    if mode:
        state_pooling(model, mode)
    names = tiny.LABELS if task == "classification" else ()
    chosen = tiny.options(model, tmp_path, task=task, labels=names, quantisation="none")
    stored, reference = tiny.store_model(chosen)
    sliced = {
        source.rpartition(".")[0] for segment in stored.segments[1:-1] for source in segment.slices.values()
    }
    assert {re.sub(r".*\.layers?\.\d+\.", "", path) for path in sliced} == set(targets)

    ids, mask = torch.arange(1, 31).reshape(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[1, 7:] = 0
    last = (mask * torch.arange(10)).argmax(1, keepdim=True)
    following = torch.where(torch.arange(10) < last, ids.roll(-1, 1), NOT_PREDICTED)
    labels = following if task == "causal_lm" else torch.arange(3)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    slices = tiny.moved_slices(reference)
    generator = torch.Generator().manual_seed(5)
    loss, gradients = reference.example_gradients(batch, slices)
    dots = {n: torch.randn(2, *g.shape, generator=generator) for n, g in gradients.items()}
    own, jvps = forward_mode(stored, batch, slices, dots)
    exact = sum((dots[n] * g).flatten(2).sum(2) for n, g in gradients.items())
    assert isinstance(exact, torch.Tensor)
    torch.testing.assert_close(own, loss, rtol=LIMIT, atol=0)
    assert (jvps - exact).abs().max() < LIMIT * exact.abs().max()

    untrained = {n: torch.zeros_like(value) for n, value in slices.items() if n != "head.weight"}
    weight = reference.tensors.get("head.weight")
    if weight is not None:
        untrained["head.weight"] = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        reference.run(batch, untrained)["loss"], own_loss(model, task, batch, pooled), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_shared_block_is_stored_once_and_its_slices_serve_every_call(export_family) -> None:
    """ALBERT calls one block three times: three segments on one weight file, and one slice for each target in all."""
    manifest = export_family("albert", "classification")[1].package.manifest
    blocks = manifest.segments[1:-1]
    assert len(blocks) == 3
    assert {tensor.file for block in blocks for tensor in block.weights.values()} == {"weights/block_0.bin"}
    assert [spec.segments for spec in manifest.slices] == [(1, 2, 3), (1, 2, 3), (4,)]
    assert [manifest.weights_owner(index) for index in range(5)] == [0, 1, 1, 1, 4]


@pytest.mark.slow
def test_a_prefix_cache_serves_a_decoder(export_family, tmp_path) -> None:
    """Examples kept one at a time come back as a batch: rotary tables, one for all, are not kept by example."""
    package = export_family("llama", "causal_lm")[1].package
    prepared = PreparedPackage.as_stored(package)
    manifest = package.manifest
    values = decode_values(package.path(manifest.initial_state).read_bytes(), manifest.slices)
    specs = [spec for spec in manifest.slices if spec.segment == len(manifest.segments) - 2]
    names = [spec.name for spec in specs]
    tangents = {name: np.ones((1, 2, *shape[1:]), np.float32) for name, shape in shapes(specs).items()}
    alone = {name: array[:, :1] for name, array in tangents.items()}
    together = tiny.make_text_batch(package, (tiny.SENTENCES[0], tiny.SENTENCES[0]))
    single = tiny.make_text_batch(package, tiny.SENTENCES[:1])
    plain = Executor(prepared, OnnxEngine(), names).sweep(values, [together], [tangents])
    with PrefixCache(tmp_path, 1 << 24) as cache:
        executor = Executor(prepared, OnnxEngine(), names, cache=cache)
        for row in (0, 1):
            executor.sweep(values, [single], [alone], [[row]])
        cached = executor.sweep(values, [together], [tangents], [[0, 1]])
        assert cache.hits == 2
    np.testing.assert_allclose(cached.loss, plain.loss, rtol=1e-5)
    np.testing.assert_allclose(cached.jvps, plain.jvps, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_decoder_in_int4_agrees_forwards_and_backwards(tmp_path) -> None:
    """A Llama in int4 points the way of torch on the same weights in every arithmetic, jvps and gradients alike."""
    model = tiny.write_model(tmp_path / "llama", "llama", "causal_lm")
    options = {"task": "causal_lm", "labels": (), "quantisation": "int4", "with_adjoint": True}
    manifest = tiny.export(model, tmp_path / "out", **options).package.manifest
    assert set(manifest.self_checks) == {"row_int8", "block_int4", "float"}
    assert all(check.jvp_cosine > 0.99 for check in manifest.self_checks.values())
    exact, rounded = manifest.self_checks["float"], manifest.self_checks["row_int8"]
    assert exact.gradient is not None
    assert exact.gradient < LIMIT
    assert rounded.gradient_cosine is not None
    assert rounded.gradient_cosine > 0.99
    assert manifest.quantisation_effect is not None
    assert 0.8 < manifest.quantisation_effect.jvp_cosine < 1
