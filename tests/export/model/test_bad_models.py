"""Model folders that cannot be exported: one clear line each, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from edge_runtime.errors import ModelError
from edge_runtime.protocol.signing import generate_key
from export.autodiff.dual import MissingRuleError
from export.model.folder import check_model_folder, require_finite
from export.packaging.export_package import export_package
from export.packaging.tokenizer import write_tokenizer
from tests.export import tiny


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "models" / "damaged"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The copy with its weights in several shards."""
    AutoModel.from_pretrained(folder, local_files_only=True).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def refuse(model: Path, output: Path, kind: type[ModelError] = ModelError, **changes: object) -> str:
    """The message with which an export is refused: one line, and nothing beside or at ``output``."""
    output.parent.mkdir()
    with pytest.raises(kind) as caught:
        export_package(tiny.options(model, output, **changes), generate_key(), lambda _: None)
    assert list(output.parent.iterdir()) == []
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object; None removes one."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_counted(value: float) -> None:
    """NaN and infinities of either sign are refused, by the tensor's name and with their number."""
    tensor = torch.zeros(8)
    tensor[[2, 5]] = value
    with pytest.raises(ModelError, match="weight w holds 2 values that are not finite, of 8"):
        require_finite("w", tensor)


def test_a_weight_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    """One NaN among the weights refuses the export, with the tensor's name."""
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = refuse(folder, tmp_path / "out" / "package")
    assert "weight encoder.layer.1.output.dense.weight holds 1 values that are not finite, of 8192" in message


def test_finite_and_integer_weights_pass() -> None:
    """Finite floats of any width, and integers, are let through."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        require_finite("weight", torch.ones(3, dtype=dtype))


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    """A shard that the index names and the folder lacks is named, with how many there should be."""
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    count = len(list(sharded.glob("model-*.safetensors")))
    lost.unlink()
    message = refuse(sharded, tmp_path / "out" / "package")
    assert f"lacks 1 of the {count} weight files its index names, the first is {lost.name}" in message


def test_a_cut_off_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    """A download that stopped half-way is told from its header alone, and the file is named."""
    cut = sorted(sharded.glob("model-*.safetensors"))[0]
    cut.write_bytes(cut.read_bytes()[:-7])
    message = refuse(sharded, tmp_path / "out" / "package")
    assert f"{cut.name} is not a whole safetensors file" in message


def test_a_tensor_missing_from_its_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    """An index that places a tensor where it is not names tensor and shard."""
    path = sorted(sharded.glob("model-*.safetensors"))[0]
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    message = refuse(sharded, tmp_path / "out" / "package")
    assert f"{path.name} lacks {lost}" in message


@pytest.mark.parametrize("places", [None, {}, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": "/etc/x"}])
def test_an_index_without_places_is_refused(sharded: Path, tmp_path: Path, places: object) -> None:
    """An index must map tensor names to file names in its folder; nothing outside the folder is opened."""
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "has no weight_map" in refuse(sharded, tmp_path / "out" / "package")


def test_a_folder_without_weights_says_which_it_looked_for(folder: Path, tmp_path: Path) -> None:
    """No weights at all: the names that were looked for are in the message."""
    (folder / "model.safetensors").unlink()
    message = refuse(folder, tmp_path / "out" / "package")
    assert "neither model.safetensors nor pytorch_model.bin, nor an index of shards" in message


@pytest.mark.parametrize("content", [b"[]", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_a_config_that_is_no_object_is_refused(folder: Path, tmp_path: Path, content: bytes) -> None:
    """config.json must hold one JSON object; arrays, torn files and absurd nesting are refused by name."""
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refuse(folder, tmp_path / "out" / "package")


def test_another_number_of_labels_is_refused(folder: Path, tmp_path: Path) -> None:
    """A model that names five labels is not exported for three, and both counts are in the message."""
    names = {str(i): f"mood {i}" for i in range(5)}
    change_json(folder / "config.json", id2label=names, label2id={v: int(k) for k, v in names.items()})
    message = refuse(folder, tmp_path / "out" / "package")
    assert "names 5 labels (id2label) and --labels has 3" in message
    assert "remove id2label" in message


@pytest.mark.parametrize(
    "named", [None, {"0": "LABEL_0", "1": "LABEL_1"}, {"0": "a", "1": "b", "2": "c"}], ids=str
)
def test_label_maps_that_say_nothing_against_it_pass(folder: Path, named: dict[str, str] | None) -> None:
    """No label map, the one transformers writes by default, and one of equal size are all fine for three labels."""
    change_json(folder / "config.json", id2label=named)
    check_model_folder(folder, tiny.LABELS)


def test_a_label_map_does_not_concern_a_language_model(folder: Path) -> None:
    """Without labels, as for a causal language model, the folder's label map is not looked at."""
    change_json(folder / "config.json", id2label={str(i): str(i) for i in range(9)})
    check_model_folder(folder, ())


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_the_folders_own_is_refused(folder: Path, tmp_path: Path, file: str) -> None:
    """A folder that asks to run its own Python code is refused, with the option that would allow it."""
    change_json(folder / "config.json", model_type="odd")
    change_json(folder / file, auto_map={"AutoModel": "modeling_odd.OddModel"})
    message = refuse(folder, tmp_path / "out" / "package")
    assert f"{file} asks to run Python code" in message
    assert "--trust-remote-code" in message


def test_refused_code_does_not_run_and_trusted_code_does(folder: Path, tmp_path: Path) -> None:
    """The folder's module leaves a mark when imported: only --trust-remote-code's option makes it appear."""
    mark = tmp_path / "mark"
    (folder / "odd.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import BertConfig, BertModel\n"
        "class OddConfig(BertConfig):\n    model_type = 'odd'\n"
        "class OddModel(BertModel):\n    config_class = OddConfig\n"
    )
    change_json(
        folder / "config.json",
        model_type="odd",
        architectures=["OddModel"],
        auto_map={"AutoConfig": "odd.OddConfig", "AutoModel": "odd.OddModel"},
    )
    refuse(folder, tmp_path / "out" / "package")
    assert not mark.exists()
    options = tiny.options(folder, tmp_path / "out" / "package", trust_remote_code=True)
    package = export_package(options, generate_key(), lambda _: None)
    assert mark.exists()
    assert package.manifest.base.architecture == "odd"


def test_an_operator_without_rule_is_named_with_its_module(tmp_path: Path) -> None:
    """Mish has no tangent rule: operator, node, module and what to do are in the message, and no file remains."""
    model = tiny.write_model(tmp_path / "model", hidden_act="mish")
    message = refuse(model, tmp_path / "out" / "package", MissingRuleError)
    assert "no tangent rule for operator aten.log1p.default (node log1p of module " in message
    assert "of module encoder.encoder.layer.0.intermediate" in message
    assert "MishActivation)" in message
    assert "name --targets that lie behind it in the last block" in message


def without_tokens(*names: str) -> Callable[[Path], Path]:
    """A change to a folder: its tokenizer loses these special tokens."""

    def change(folder: Path) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        for name in names:
            setattr(tokenizer, name, None)
        tokenizer.save_pretrained(folder)
        return folder

    return change


def test_the_folders_own_padding_token_is_used(folder: Path, tmp_path: Path) -> None:
    """A tokenizer with a padding token gives its id and needs no note."""
    expected = AutoTokenizer.from_pretrained(folder, local_files_only=True).pad_token_id
    assert write_tokenizer(folder, tmp_path / "tokenizer.json", 160) == (expected, None)


def test_without_padding_token_the_unknown_one_pads(folder: Path, tmp_path: Path) -> None:
    """No padding token: texts are padded with the unknown token, and the export says so."""
    without_tokens("pad_token")(folder)
    unknown = AutoTokenizer.from_pretrained(folder, local_files_only=True).unk_token_id
    said: list[str] = []
    package = export_package(tiny.options(folder, tmp_path / "package"), generate_key(), said.append)
    assert package.manifest.pad_token_id == unknown
    assert f"The tokenizer has no padding token: texts are padded with the unknown token {unknown}" in said


def test_without_unknown_token_the_last_one_pads(folder: Path, tmp_path: Path) -> None:
    """Neither padding nor unknown token, as in GPT-2: the token that ends a text pads."""
    without_tokens("pad_token", "unk_token")(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    pad, note = write_tokenizer(folder, tmp_path / "tokenizer.json", 160)
    assert pad == tokenizer.convert_tokens_to_ids("[SEP]")
    assert note is not None
    assert "end-of-text token" in note


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(folder: Path, tmp_path: Path) -> None:
    """No padding, unknown or end-of-text token: refused, with what to set, and no file is written."""
    without_tokens("pad_token", "unk_token", "eos_token")(folder)
    message = refuse(folder, tmp_path / "out" / "package")
    assert "set pad_token in its tokenizer_config.json" in message
    with pytest.raises(ModelError):
        write_tokenizer(folder, tmp_path / "tokenizer.json", 160)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_folder_without_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    """A model without any tokenizer file is refused with the folder's name."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "damaged has no tokenizer the device could read" in refuse(folder, tmp_path / "out" / "package")
