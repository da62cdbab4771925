"""From ``peft`` to a package and back: the same numbers at every station."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edge_runtime.errors import ConfigError, ModelError
from edge_runtime.package.package import Package
from edge_runtime.protocol.signing import generate_key
from export.adapters.write import whole_factor, write_adapter
from export.cli import main
from export.packaging.export_package import export_package
from export.quantisation.quantise import dequantise, quantise
from tests.export import peft_models, tiny

pytestmark = pytest.mark.filterwarnings(peft_models.OLD_NAME)


def export(model: Path, output: Path, **changes: object) -> Package:
    """A float package of a model, so that it can be compared with torch to the last digits."""
    options = tiny.options(model, output, quantisation="none", **changes)
    return export_package(options, generate_key(), lambda _: None)


@pytest.fixture(scope="module")
def encoder_xs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The tiny BERT with LoRA-XS slices."""
    return export(tiny_model, tmp_path_factory.mktemp("xs") / "package")


def test_a_lora_xs_run_round_trips(encoder_xs: Package, tiny_model: Path, tmp_path: Path) -> None:
    """peft computes from a LoRA-XS adapter what the package computes, and a package started from it has its cores."""
    values = peft_models.random_values(encoder_xs)
    folder = write_adapter(encoder_xs, values, tmp_path / "adapter", "base")
    batch = tiny.make_text_batch(encoder_xs)
    ours = peft_models.run(encoder_xs, values, batch)
    model = peft_models.load_adapter(peft_models.base_model(tiny_model), folder)
    assert np.abs(peft_models.predict(model, folder, batch) - ours).max() < 1e-4
    assert np.abs(peft_models.run(encoder_xs, peft_models.initial(encoder_xs), batch) - ours).max() > 1e-1

    again = export(tiny_model, tmp_path / "again", kind="lora_xs", adapter=folder)
    found = peft_models.initial(again)
    assert found.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def test_a_pair_outside_the_span_is_refused(encoder_xs: Package, tiny_model: Path, tmp_path: Path) -> None:
    """A LoRA-XS package does not start from a pair it cannot express: the part outside is told, nothing is written."""
    folder = write_adapter(encoder_xs, peft_models.random_values(encoder_xs), tmp_path / "adapter", "base")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name] = tensors[name] + 0.01 * np.random.default_rng(1).standard_normal(
        tensors[name].shape
    ).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"^0\.0\d+ of .* outside the span .* limit 0\.001; .*--slice lora$"):
        export(tiny_model, tmp_path / "again", kind="lora_xs", adapter=folder)
    assert not (tmp_path / "again").exists()


def test_a_lora_run_round_trips(tiny_model: Path, tmp_path: Path) -> None:
    """A package started from peft's adapter computes what peft computes, before and after training moves its values."""
    settings = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["query", "output.dense"]}
    theirs = peft_models.write_random_adapter(
        peft_models.base_model(tiny_model), tmp_path / "theirs", **settings
    )
    package = export(tiny_model, tmp_path / "package", kind="lora", adapter=theirs)
    targets = sorted(spec.target for spec in package.manifest.slices if spec.kind != "head")
    assert len(targets) == 6  # query, attention.output.dense and output.dense of two blocks
    tensors = load_file(theirs / "adapter_model.safetensors")
    values = peft_models.initial(package)
    for target in targets:
        for part in "AB":
            expected = tensors[f"base_model.model.{target}.lora_{part}.weight"]
            np.testing.assert_array_equal(values[f"{target}/{part}"][0], expected)

    batch = tiny.make_text_batch(package)
    random = peft_models.random_values(package)
    head = {name: value for name, value in random.items() if name.startswith("head/")}
    for number, now in enumerate((values | head, random)):
        ours = write_adapter(package, now, tmp_path / f"ours{number}", "base")
        expected = peft_models.run(package, now, batch)
        for adapter in (theirs, ours)[number:]:
            model = peft_models.load_adapter(peft_models.base_model(tiny_model), adapter)
            assert np.abs(peft_models.predict(model, ours, batch) - expected).max() < 1e-4, adapter


def test_an_adapter_of_a_class_with_a_head_starts_a_package(tiny_model: Path, tmp_path: Path) -> None:
    """peft names modules by the wrapped class: what was trained on BertForMaskedLM fits the encoder all the same."""
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(tiny_model, local_files_only=True)
    theirs = peft_models.write_random_adapter(model, tmp_path / "theirs", r=2, target_modules=["key"])
    tensors = load_file(theirs / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.bert.encoder.") for name in tensors)
    package = export(tiny_model, tmp_path / "package", kind="lora", adapter=theirs)
    name = "encoder.layer.1.attention.self.key"
    np.testing.assert_array_equal(
        peft_models.initial(package)[f"{name}/A"][0], tensors[f"base_model.model.bert.{name}.lora_A.weight"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "targets"),
    [
        ("llama", "lora", ["q_proj", "down_proj"]),
        ("llama", "lora_xs", ["q_proj", "down_proj"]),
        ("gpt2", "lora", ["c_attn"]),
    ],
)
def test_a_language_model_round_trips(tmp_path: Path, family: str, kind: str, targets: list[str]) -> None:
    """peft's adapter of a decoder starts a package of equal losses; its result loads on the same class."""
    model = tiny.write_model(tmp_path / "model", family, "causal_lm")
    changes: dict[str, object] = {"task": "causal_lm", "labels": (), "kind": kind}
    theirs = None
    if kind == "lora":
        theirs = peft_models.write_random_adapter(
            peft_models.base_model(model, "causal_lm"),
            tmp_path / "theirs",
            r=4,
            target_modules=targets,
            fan_in_fan_out=family == "gpt2",
            task_type="CAUSAL_LM",
        )
        changes["adapter"] = theirs
    else:
        changes["targets"] = tuple(targets)
    package = export(model, tmp_path / "package", **changes)
    batch = tiny.make_text_batch(package)
    if theirs is not None:
        adapted = peft_models.load_adapter(peft_models.base_model(model, "causal_lm"), theirs)
        ours = peft_models.run(package, peft_models.initial(package), batch)
        np.testing.assert_allclose(peft_models.predict(adapted, None, batch), ours, atol=1e-4)

    values = peft_models.random_values(package)
    trained = peft_models.run(package, values, batch)
    assert np.abs(trained - peft_models.run(package, peft_models.initial(package), batch)).max() > 1e-2
    folder = write_adapter(package, values, tmp_path / "ours", "base")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    adapted = peft_models.load_adapter(peft_models.base_model(model, "causal_lm"), folder)
    assert adapted.peft_config["default"].task_type == "CAUSAL_LM"
    np.testing.assert_allclose(peft_models.predict(adapted, None, batch), trained, atol=1e-4)


@pytest.mark.parametrize("joint", ["_", "."])
@pytest.mark.parametrize("quantisation", ["int8", "int4"])
def test_quantised_factors_are_put_together(joint: str, quantisation: str) -> None:
    """At rank 32 a package may hold a factor quantised: the adapter takes the values that programs compute with."""
    factor = torch.randn(48, 32, generator=torch.Generator().manual_seed(3))
    parts = quantise(factor, "linear", quantisation)
    stored = {f"block_up{joint}{part}": tensor for part, tensor in parts.items()}
    found = whole_factor(stored, "block_up", joint)
    assert torch.equal(found, dequantise(*parts.values()))
    step = factor.abs().max() / (127 if quantisation == "int8" else 7)
    assert 0 < (found - factor).abs().max() < step
    assert whole_factor({"block_up": factor}, "block_up", joint) is factor
    with pytest.raises(ModelError, match="no tensor block_down"):
        whole_factor(stored, "block_down", joint)


@pytest.mark.parametrize("own", [("--rank", "4"), ("--targets", "query"), ("--alpha", "8")])
def test_what_an_adapter_brings_is_not_given_twice(
    own: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside --adapter, its own rank, targets and scale are refused by name before anything is loaded."""
    (tmp_path / "labels.json").write_text('["bad", "good"]')
    (tmp_path / "rows.jsonl").write_text('{"text": "fine", "label": "good"}\n')
    generate_key().save(tmp_path / "key")
    files = {
        "labels": "labels.json",
        "check-data": "rows.jsonl",
        "key": "key",
        "adapter": "a",
        "output": "out",
    }
    given = [word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file))]
    assert main(["package", str(tmp_path / "no-model"), *given, *own]) == ConfigError.exit_code
    assert f"{own[0]} is the adapter's own" in capsys.readouterr().err
