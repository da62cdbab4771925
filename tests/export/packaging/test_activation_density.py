"""A package whose feed-forward parts keep their largest activations: what it computes, holds and says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_runtime.memory.plan import live_bytes
from edge_runtime.package.slices import encode_values
from export.cli import main
from export.packaging.activation_density import activation_density
from tests.export import tiny

KEPT = 16


@pytest.fixture(scope="module")
def topk(tiny_model):
    """The model with 16 of 128 activations kept, in float32, with adjoint programs."""
    return tiny.export_shared(tiny_model, mlp_topk=KEPT, quantisation="none", with_adjoint=True)


def test_the_density_is_that_of_real_tokens(topk) -> None:
    """GELU is nowhere zero, so exactly k of F activations are not; padding counts for nothing."""
    top = topk.package.manifest.mlp_topk
    assert (top.kept, top.width, top.density) == (KEPT, tiny.INNER, KEPT / tiny.INNER)
    assert 0.3 < top.positive < 0.7
    batch = tiny.torch_batch(tiny.make_text_batch(topk.package))
    longer = {
        **batch,
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3)),
    }
    assert activation_density(topk.reference, batch) == pytest.approx(
        activation_density(topk.reference, longer)
    )


def test_programs_and_gradients_are_those_of_torch(topk) -> None:
    """Loss, directional derivatives and the adjoint gradient agree with torch's own backpropagation."""
    check = topk.package.manifest.self_checks["float"]
    assert max(check.loss, check.jvp, check.gradient) < 1e-5


def test_it_computes_another_function_than_the_dense_model(topk, exported_plain) -> None:
    """Keeping an eighth of the activations changes the hidden states; it is no dense package under another name."""
    batch = tiny.torch_batch(tiny.make_text_batch(topk.package))
    generator = torch.Generator().manual_seed(2)
    head = {
        name: torch.randn(topk.reference.tensors[name].shape, generator=generator)
        for name in topk.reference.trainable
        if name.startswith("head.")
    }
    ours, dense = (each.reference.run(batch, head)["logits"] for each in (topk, exported_plain))
    assert float((ours - dense).abs().max() / dense.abs().max()) > 0.01


def test_the_live_set_is_smaller_than_with_all_activations(topk) -> None:
    """At short texts, where feed-forward parts hold most, a block with tangents holds less than the dense one."""
    manifest = topk.package.manifest
    variant = manifest.programs[manifest.segments[-2].dual].variants["float"]
    dense = type(variant)(variant.file, variant.fed, live=manifest.mlp_topk.dense_live["float"])
    assert live_bytes(variant, 4, 8, 8) < live_bytes(dense, 4, 8, 8)


@pytest.mark.parametrize("command", ["merge", "adapter"])
def test_what_peft_and_folders_cannot_say_is_told(
    topk, tiny_model, tmp_path: Path, capsys, command: str
) -> None:
    """A merged model and an adapter are written, and a line says that they keep all activations."""
    manifest, slices = topk.package.manifest, tmp_path / "slices"
    values = {
        f"{spec.name}/{part.name}": np.zeros(part.shape, np.float32)
        for spec in manifest.slices
        for part in spec.tensors
    }
    slices.write_bytes(encode_values(values))
    words = [command, str(topk.package.folder)] + ([str(tiny_model)] if command == "merge" else [])
    words += [
        "--slices",
        str(slices),
        "--publisher-key",
        topk.key.public_key,
        "--output",
        str(tmp_path / "out"),
    ]
    words += ["--base-model", "it"] if command == "adapter" else []
    assert main(words) == 0
    assert f"not carried: the {KEPT} of {tiny.INNER} activations" in capsys.readouterr().out
