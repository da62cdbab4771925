"""A merged classifier as one ONNX file: readers that know nothing of this project predict what the package predicts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from export.cli import main
from tests.export import classifiers, tiny
from tests.export.adapters.test_block_heads import trained

#: Predicts with onnxruntime and tokenizers alone; neither torch, transformers nor this project can be imported.
READS = """
import json, sys
for name in ("torch", "transformers", "edge_runtime", "export", "coordinator", "tests"):
    sys.modules[name] = None
import numpy, onnxruntime, tokenizers
folder, *texts = json.load(sys.stdin)
tokenizer = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.no_truncation()
tokenizer.enable_padding()
encoded = tokenizer.encode_batch(texts)
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
given = {
    "input_ids": numpy.array([each.ids for each in encoded], numpy.int64),
    "attention_mask": numpy.array([each.attention_mask for each in encoded], numpy.int64),
}
(logits,) = session.run(None, given)
print(json.dumps({"labels": json.load(open(folder + "/labels.json")), "logits": logits.tolist()}))
"""


def read_alone(folder: Path, texts: list[str]) -> tuple[list[str], np.ndarray]:
    """Labels and logits (texts, labels) from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", READS],
        input=json.dumps([str(folder), *texts]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["labels"], np.array(found["logits"])


def test_onnxruntime_alone_predicts_what_the_package_predicts(
    exported_plain, tiny_model: Path, tmp_path: Path
) -> None:
    """A head over several blocks, merged and written as ONNX, gives the runtime's logits on texts of unlike lengths."""
    values, logits, _ = trained(exported_plain.package, "mean", tmp_path / "prepared")
    slices, merged, output = (tmp_path / name for name in ("slices", "merged", "onnx"))
    slices.write_bytes(values)
    package, key = str(exported_plain.package.folder), exported_plain.key.public_key
    given = ["--slices", str(slices), "--publisher-key", key, "--output", str(merged)]
    assert main(["merge", package, str(tiny_model), *given]) == 0
    assert main(["onnx", str(merged), "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["labels.json", "model.onnx", "tokenizer.json"]
    labels, found = read_alone(output, list(tiny.SENTENCES))
    assert labels == list(exported_plain.package.manifest.labels)
    np.testing.assert_allclose(found, logits, atol=2e-4)


def test_a_classifier_of_transformers_own_class_is_written_too(tmp_path: Path) -> None:
    """A folder whose classifier went on from its own head gives the logits of transformers' class, by its labels."""
    folder = classifiers.write_classifier(tmp_path / "model", "distilbert", ("no", "yes", "maybe"))
    assert main(["onnx", str(folder), "--output", str(tmp_path / "onnx")]) == 0
    labels, found = read_alone(tmp_path / "onnx", [tiny.SENTENCES[0]])
    ids = encode(folder, tiny.SENTENCES[0])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits.numpy()
    assert labels == ["no", "yes", "maybe"]
    np.testing.assert_allclose(found, expected, atol=2e-4)


def encode(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no tokenizer.json; give a folder that edge-export merge wrote"),
        (
            {"tokenizer.json": "{}", "config.json": '{"architectures": ["LlamaForCausalLM"]}'},
            "holds no classifier (LlamaForCausalLM",
        ),
        ({"tokenizer.json": "{}", "head.json": "{}", "config.json": "{}"}, "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_merged_classifier_is_refused_in_one_line(
    files: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without tokenizer, classifier or whole head nothing is written, and one line says what to give instead."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert main(["onnx", str(folder), "--output", str(tmp_path / "onnx")]) != 0
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "onnx").exists()


def test_what_is_there_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output that exists, or a model that does not, is told before anything is loaded."""
    (tmp_path / "model").mkdir()
    assert main(["onnx", str(tmp_path / "model"), "--output", str(tmp_path)]) != 0
    assert "choose another --output" in capsys.readouterr().err
    assert main(["onnx", str(tmp_path / "none"), "--output", str(tmp_path / "onnx")]) != 0
    assert "is no folder" in capsys.readouterr().err


def test_a_model_too_large_for_one_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above the format's limit the command says so, with both sizes, before it translates."""
    from export.adapters import onnx_model

    folder = classifiers.write_classifier(tmp_path / "model", "distilbert", ("no", "yes"))
    monkeypatch.setattr(onnx_model, "MOST_BYTES", 1000)
    assert main(["onnx", str(folder), "--output", str(tmp_path / "onnx")]) != 0
    assert "one ONNX file holds at most 1000" in capsys.readouterr().err
