"""The command line ``edge-export``: what its options become, and what it refuses before it loads anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edge_runtime.errors import ConfigError, ModelError
from edge_runtime.package.package import Package
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol.signing import PrivateKey, generate_key
from export import cli
from export.cli import main
from export.packaging import export_package
from export.packaging.export_package import ExportOptions
from tests.edge_runtime.bigram import write_bigram
from tests.export import peft_models, tiny


class Asked(NamedTuple):
    """What the exporter was asked for."""

    options: ExportOptions
    key: PrivateKey


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """What the exporter was asked for, call by call; nothing is exported."""
    calls: list[Asked] = []

    def stop(options: ExportOptions, key: PrivateKey, *_: object) -> None:
        calls.append(Asked(options, key))
        raise ConfigError("asked")

    monkeypatch.setattr(export_package, "export_package", stop)
    return calls


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The options that every export of a classifier needs."""
    (tmp_path / "labels.json").write_text(json.dumps(tiny.LABELS))
    rows = [{"text": text, "label": tiny.LABELS[0]} for text in tiny.CHECK_TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_key().save(tmp_path / "key")
    return [
        *("--labels", str(tmp_path / "labels.json"), "--check-data", str(tmp_path / "rows.jsonl")),
        *("--key", str(tmp_path / "key"), "--output", str(tmp_path / "package")),
    ]


def test_every_option_reaches_the_export(
    asked: list[Asked], given: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    """Each option of 'package' is handed to the exporter as it was given, and each has its default without it."""
    words = ["package", str(tiny_model), *given]
    assert main(words) == ConfigError.exit_code
    plain = asked[0].options
    assert len(plain.check_labels) == len(plain.check_texts)
    assert replace(plain, check_labels=()) == tiny.options(
        tiny_model, tmp_path / "package", rank=4, sequence_limit=128
    )
    assert asked[0].key.public_key == PrivateKey.load(tmp_path / "key").public_key
    slices = ["--slice", "lora", "--rank", "2", "--alpha", "3.5", "--targets", "query, key", "--seed", "9"]
    assert plain.factors == "weight"
    more = [
        "--sequence-limit",
        "16",
        "--quant",
        "int4",
        "--with-adjoint",
        "--engine",
        "onnxruntime,executorch",
    ]
    assert main([*words, *slices, *more, "--trust-remote-code"]) == ConfigError.exit_code
    chosen = asked[1].options
    assert (chosen.slices.kind, chosen.slices.rank, chosen.slices.alpha) == ("lora", 2, 3.5)
    assert (chosen.slices.targets, chosen.slices.seed) == (("query", "key"), 9)
    assert (chosen.sequence_limit, chosen.quantisation, chosen.with_adjoint) == (16, "int4", True)
    assert (chosen.engines, chosen.trust_remote_code) == (("onnxruntime", "executorch"), True)
    assert (
        main([*words, "--slice", "sparse", "--density", "0.2", "--mask", "fisher"]) == ConfigError.exit_code
    )
    sparse = asked.pop().options
    assert (sparse.slices.kind, sparse.slices.density, sparse.mask) == ("sparse", 0.2, "fisher")
    assert main([*words, "--mlp-topk", "16"]) == ConfigError.exit_code
    assert asked.pop().options.mlp_topk == 16
    assert main([*words, "--factors", "inputs"]) == ConfigError.exit_code
    whitened = asked.pop().options
    assert (whitened.slices.kind, whitened.factors) == ("lora_xs", "inputs")
    adapter = peft_models.write_random_adapter(
        peft_models.base_model(tiny_model), tmp_path / "adapter", target_modules=["query"], r=2
    )
    assert main([*words, "--adapter", str(adapter)]) == ConfigError.exit_code
    assert (asked[2].options.adapter, asked[2].options.slices.kind) == (adapter, "lora")
    decoder = tiny.write_model(tmp_path / "decoder", "llama", "causal_lm")
    (tmp_path / "texts.jsonl").write_text('{"text": "a quiet joy"}\n')
    words = ["package", str(decoder), "--task", "causal_lm", "--check-data", str(tmp_path / "texts.jsonl")]
    assert main([*words, *given[4:], "--with-generation"]) == ConfigError.exit_code
    assert (asked[3].options.task, asked[3].options.labels) == ("causal_lm", ())
    assert asked[3].options.with_generation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--slice", "sparse", "--density", "0"), "--density is 0.0, must be above 0 and at most 1"),
        (("--slice", "sparse", "--density", "1.5"), "--density is 1.5, must be above 0 and at most 1"),
        (
            ("--slice", "lora", "--density", "0.1"),
            "--density does not go with this kind of slices: it belongs to",
        ),
        (("--mask", "random"), "--mask does not go with this kind of slices: it belongs to --slice sparse"),
        (
            ("--slice", "lora", "--factors", "inputs"),
            "--factors does not go with this kind of slices: lora has none; take --slice lora_xs",
        ),
        (("--slice", "sparse", "--rank", "4"), "sparse has no rank: take --density"),
        (("--slice", "rows", "--alpha", "4"), "rows have no scale; leave it out"),
        (("--mlp-topk", "0"), "--mlp-topk is 0, must be from 1 to 128, the width of its parts"),
        (("--mlp-topk", "129"), "--mlp-topk is 129, must be from 1 to 128, the width of its parts"),
        (
            ("--mlp-topk", "16", "--engine", "onnxruntime,executorch"),
            "--mlp-topk has no programs for ExecuTorch; leave executorch out of --engine",
        ),
    ],
)
def test_options_of_another_kind_are_refused(
    asked: list[Asked],
    given: list[str],
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    """A density out of range, and options that do not go with the kind of slices, are one line before anything else."""
    assert main(["package", str(tiny_model), *given, *options]) == ConfigError.exit_code
    assert message in capsys.readouterr().err
    assert not asked


def test_a_key_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """'key' prints the public half of what it wrote, and a second call leaves the first key alone."""
    path = tmp_path / "publisher.key"
    assert main(["key", str(path)]) == 0
    assert capsys.readouterr().out == f"{PrivateKey.load(path).public_key}\n"
    written = path.read_bytes()
    assert main(["key", str(path)]) == ConfigError.exit_code
    assert "a key is never overwritten; use it, or name another file" in capsys.readouterr().err
    assert path.read_bytes() == written
    assert main(["key", str(tmp_path / "nowhere" / "publisher.key")]) == 1
    said = capsys.readouterr().err
    assert (
        f"cannot use {tmp_path / 'nowhere' / 'publisher.key'}: No such file or directory; check the path"
        in said
    )


def test_a_key_that_is_not_there_is_made_as_the_message_says(
    asked: list[Asked], given: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """'package' without its key file ends with the command that makes one; after it the export begins."""
    (tmp_path / "key").unlink()
    words = ["package", str(tiny_model), *given]
    assert main(words) == ConfigError.exit_code
    said = capsys.readouterr().err.strip()
    assert (
        said
        == f"error: there is no key file {tmp_path / 'key'}; make one with: edge-export key {tmp_path / 'key'}"
    )
    assert not asked
    assert main(said.partition("edge-export ")[2].split()) == 0
    assert main(words) == ConfigError.exit_code
    assert len(asked) == 1


def test_the_summary_tells_a_size_once(tmp_path: Path) -> None:
    """Sizes that a short sequence limit makes one have one line of predicted memory."""
    key = generate_key()
    write_bigram(tmp_path, key)
    said = cli.summary(Package.open(tmp_path, key.public_key)).splitlines()
    sizes = [line.partition(":")[0].strip() for line in said if "at best speed" in line]
    tokens = Package.open(tmp_path, key.public_key).manifest.sequence_limit
    draws = ("1 draw", "4 draws")
    assert tokens < 64
    assert sizes == [
        f"batch 1, {tokens} tokens, 1 draw",
        *(f"batch 8, {tokens} tokens, {each}" for each in draws),
    ]


@pytest.mark.parametrize("command", ["adapter", "merge"])
def test_slices_of_another_run_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that do not fit the package end 'adapter' and 'merge' with one line, before libraries are loaded."""

    def loaded(*_: Any) -> None:
        raise AssertionError("transformers was loaded")

    monkeypatch.setattr(cli, "_quieten_libraries", loaded)
    key = generate_key()
    write_bigram(tmp_path / "package", key)
    (tmp_path / "slices").write_bytes(encode_values({}))
    words = [command, str(tmp_path / "package"), *([str(tmp_path)] if command == "merge" else [])]
    words += ["--publisher-key", key.public_key, "--slices", str(tmp_path / "slices")]
    words += ["--output", str(tmp_path / "out"), *(["--base-model", "b"] if command == "adapter" else [])]
    assert main(words) == 36
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "slices").unlink()
    assert main(words) == ConfigError.exit_code
    said = f"get them with: edge-coordinator run fetch-slices --output {tmp_path / 'slices'}"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main(words) == ModelError.exit_code
    assert "choose another --output or remove it" in capsys.readouterr().err
