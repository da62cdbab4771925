"""A run's result merged into the model: what ``peft`` itself merges, in the folder's own layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

from edge_runtime.errors import ConfigError, ModelError
from edge_runtime.package.package import Package
from edge_runtime.package.ranked_values import cut
from edge_runtime.package.ranks import with_rank
from edge_runtime.package.slices import Values, encode_values
from edge_runtime.protocol.signing import generate_key
from export.adapters.merge import merge
from export.adapters.write import adapted, frozen_of, lora_pair, write_adapter
from export.cli import main
from export.packaging.export_package import export_package
from tests.export import peft_models, tiny, unlowered

KEY = generate_key()
pytestmark = pytest.mark.filterwarnings(peft_models.OLD_NAME)


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor by weight file and name."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def shard(folder: Path, task: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Save a folder's model again in several shards."""
    model = peft_models.base_model(folder, task, dtype=dtype)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def peft_merged(folder: Path, adapter: Path, task: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The state that ``merge_and_unload`` leaves."""
    model = peft_models.load_adapter(peft_models.base_model(folder, task, **options), adapter)
    return dict(model.merge_and_unload().state_dict())


def export(model: Path, output: Path, **changes: object) -> tuple[Package, Values]:
    """A package, and values as after a run."""
    options = tiny.options(model, output, **changes)
    package = export_package(options, KEY, lambda _: None)
    return package, peft_models.random_values(package)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, Values]:
    """The tiny BERT's int8 package with LoRA-XS slices, and values as after a run."""
    return export(tiny_model, tmp_path_factory.mktemp("trained") / "package", targets=("query", "dense"))


def test_an_encoder_merges_as_peft_merges_it(
    trained: tuple[Package, Values], tiny_model: Path, tmp_path: Path
) -> None:
    """Every tensor of the sharded encoder equals merge_and_unload's; only adapted ones differ; the head is beside."""
    package, values = trained
    plain = shard(Path(shutil.copytree(tiny_model, tmp_path / "plain")), "classification")
    model = Path(shutil.copytree(plain, tmp_path / "model"))  # with leftovers, which transformers would load
    (model / "pytorch_model.bin").write_bytes(b"older weights")
    (model / "adapter_config.json").write_text("{}")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    adapter = write_adapter(package, values, tmp_path / "adapter", "base")
    done = merge(package, values, model, tmp_path / "merged")

    before, after = tensors_of(model), tensors_of(tmp_path / "merged")
    assert {file: list(names) for file, names in before.items()} == {f: list(n) for f, n in after.items()}
    expected = peft_merged(plain, adapter, "classification")
    targets = {f"{spec.target}.weight" for spec in package.manifest.slices if spec.kind != "head"}
    for file, names in after.items():
        for name, tensor in names.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
            assert torch.equal(tensor, before[file][name]) == (name not in targets), name
    assert set(done.changed) == {file for file, names in after.items() if targets & set(names)}
    assert done.left_out == ("adapter_config.json", "pytorch_model.bin")
    others = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()} - set(done.left_out)
    made = {str(p.relative_to(done.folder)) for p in done.folder.rglob("*") if p.is_file()}
    assert made == others | {"head.safetensors", "head.json", "load_classifier.py"}
    for name in others - set(done.changed):
        assert (done.folder / name).read_bytes() == (model / name).read_bytes(), name

    batch = tiny.make_text_batch(package)
    merged = peft_models.predict(peft_models.base_model(done.folder), done.folder, batch)
    adapted = peft_models.load_adapter(peft_models.base_model(plain), adapter)
    np.testing.assert_allclose(merged, peft_models.predict(adapted, adapter, batch), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "targets", "dtype"),
    [
        ("qwen2", ("q_proj", "down_proj"), torch.bfloat16),
        ("gpt2", ("c_attn", "c_proj"), torch.float32),
    ],
)
def test_a_language_model_merges_as_peft_merges_it(
    tmp_path: Path, family: str, targets: tuple[str, ...], dtype: torch.dtype
) -> None:
    """A sharded decoder with tied embeddings, in its dtype, equals merge_and_unload; GPT-2's weights lie transposed."""
    model = tiny.write_model(tmp_path / "model", family, "causal_lm")
    shard(model, "causal_lm", dtype)
    package, values = export(model, tmp_path / "package", task="causal_lm", labels=(), targets=targets)
    adapter = write_adapter(package, values, tmp_path / "adapter", "base")
    done = merge(package, values, model, tmp_path / "merged")
    expected = peft_merged(model, adapter, "causal_lm", dtype=dtype)
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 2**-7}
    before = tensors_of(model)
    for file, names in tensors_of(done.folder).items():
        assert list(names) == list(before[file])
        for name, tensor in names.items():
            assert tensor.dtype == dtype
            torch.testing.assert_close(tensor, expected[name], **close)
    assert not (done.folder / "head.json").exists()
    loaded = peft_models.base_model(done.folder, "causal_lm")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_a_part_of_a_stored_matrix_is_merged_alone(tmp_path: Path) -> None:
    """GTE keeps query, key and value as one matrix: query and value move by scale·B·A, and the key's rows do not."""
    model = tiny.write_model(tmp_path / "model", "gte")
    made = unlowered.make(model, tmp_path / "package", tiny.LABELS, own=False)
    values = made.values()
    merge(made.package, values, model, tmp_path / "merged")
    before, after = (AutoModel.from_pretrained(path).state_dict() for path in (model, tmp_path / "merged"))
    expected = dict(before)
    for spec in adapted(made.package):
        a, b, scale = lora_pair(made.package, spec, values)
        expected[f"{spec.target}.weight"] = before[f"{spec.target}.weight"] + scale * torch.from_numpy(b @ a)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"layers.{block}.self_attn.{part}_proj.weight" for block in range(2) for part in "qv"
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_entries_off_the_mask_are_bit_identical(tmp_path: Path, tiny_model: Path) -> None:
    """A merged sparse run differs from the model in the targets' chosen entries alone, and there by its values."""
    made = unlowered.make(tiny_model, tmp_path / "package", tiny.LABELS, own=False, kind="sparse")
    values = made.values()
    merge(made.package, values, tiny_model, tmp_path / "merged")
    before, after = (
        AutoModel.from_pretrained(path).state_dict() for path in (tiny_model, tmp_path / "merged")
    )
    for spec in adapted(made.package):
        name = f"{spec.target}.weight"
        index = torch.from_numpy(frozen_of(made.package, spec)("index")).long()
        moved = torch.zeros_like(before[name], dtype=torch.bool).scatter_(1, index.T, True)
        assert torch.equal(before[name][~moved], after[name][~moved])
        expected = torch.from_numpy(values[f"{spec.name}/values"][0]).T
        torch.testing.assert_close(
            (after[name] - before[name]).gather(1, index.T), expected, atol=1e-6, rtol=1e-5
        )
        before.pop(name)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "pooler" not in name)


def test_rows_that_never_moved_are_bit_identical(tmp_path: Path, tiny_model: Path) -> None:
    """A merged run of rows differs from the model in rows that are or were chosen alone, and there by both parts."""
    made = unlowered.make(tiny_model, tmp_path / "package", tiny.LABELS, own=False, kind="rows")
    values = made.values()
    for spec in adapted(made.package):
        moved, place = (np.zeros_like(values[f"{spec.name}/{part}"]) for part in ("moved", "place"))
        moved[0, 5], place[0, 7, 0] = 0.25, 2.0
        values |= {f"{spec.name}/moved": moved, f"{spec.name}/place": place}
    merge(made.package, values, tiny_model, tmp_path / "merged")
    before, after = (
        AutoModel.from_pretrained(path).state_dict() for path in (tiny_model, tmp_path / "merged")
    )
    for spec in adapted(made.package):
        name = f"{spec.target}.weight"
        difference = after[name] - before[name]
        assert np.flatnonzero(difference.any(1)).tolist() == [5, 7]
        torch.testing.assert_close(difference[5], torch.full_like(difference[5], 0.25))
        expected = 2 * torch.from_numpy(values[f"{spec.name}/rows"][0, 0])
        torch.testing.assert_close(difference[7], expected, atol=1e-6, rtol=1e-5)


def refuse(trained: tuple[Package, Values], model: Path, output: Path) -> str:
    """The message with which a merge is refused; what lies beside ``output`` stays as it was."""
    beside = sorted(output.parent.iterdir()) if output.parent.exists() else []
    with pytest.raises(ModelError) as caught:
        merge(*trained, model, output)
    assert (sorted(output.parent.iterdir()) if output.parent.exists() else []) == beside
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_cannot_be_merged_into_are_refused(
    trained: tuple[Package, Values], tiny_model: Path, tmp_path: Path
) -> None:
    """Another model, pickled weights, an output in the model or already there: each by name, nothing written."""
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    tiny.make_model("bert", vocab_size=99).save_pretrained(other)
    message = refuse(trained, other, tmp_path / "merged")
    assert "the package was made from bert with" in message
    assert "name the folder it was exported from" in message

    pickled = Path(shutil.copytree(tiny_model, tmp_path / "pickled"))
    torch.save(peft_models.base_model(pickled).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "is no safetensors file" in refuse(trained, pickled, tmp_path / "merged")

    assert "lies in the model folder" in refuse(trained, tiny_model, tiny_model / "merged")
    (tmp_path / "taken").mkdir()
    assert "exists already" in refuse(trained, tiny_model, tmp_path / "taken")


def test_an_update_that_overflows_leaves_nothing(
    trained: tuple[Package, Values], tiny_model: Path, tmp_path: Path
) -> None:
    """A float16 model whose merged weight would be infinite is refused in the middle, and no file remains."""
    package, values = trained
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    peft_models.base_model(model, dtype=torch.float16).save_pretrained(model)
    last = [spec.name for spec in package.manifest.slices if spec.kind != "head"][-1]
    huge = {name: value * (1e7 if name.startswith(last) else 1) for name, value in values.items()}
    message = refuse((package, huge), model, tmp_path / "merged")
    assert f"weight {last}.weight holds" in message


def test_fewer_ranks_are_merged_at_their_own_scale(tmp_path: Path, tiny_model: Path) -> None:
    """The first of two ranks alone adds alpha·B·A of that rank, in a merge and in an adapter for peft."""
    made = unlowered.make(tiny_model, tmp_path / "package", tiny.LABELS, own=False)
    values = made.values()
    narrowed = with_rank(made.package.manifest, 1)
    package, few = Package(made.package.folder, narrowed, ""), cut(values, narrowed.slices)
    merge(package, few, tiny_model, tmp_path / "merged")
    before, after = (
        AutoModel.from_pretrained(path).state_dict() for path in (tiny_model, tmp_path / "merged")
    )
    for spec in adapted(made.package):
        name = f"{spec.target}.weight"
        a, b, scale = lora_pair(made.package, spec, values)
        expected = 2 * scale * torch.from_numpy(b[:, :1] @ a[:1])
        torch.testing.assert_close(after[name] - before[name], expected, rtol=1e-4, atol=1e-5)
    write_adapter(package, few, tmp_path / "adapter", "base")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (1, 2 * scale)


def test_the_commands_write_what_the_functions_write(
    trained: tuple[Package, Values],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """'merge' and 'adapter' take a package, fetched slices and the publisher's key; merge names what it changed."""
    package, values = trained
    (tmp_path / "slices").write_bytes(encode_values(values))
    given = ["--slices", str(tmp_path / "slices"), "--publisher-key", KEY.public_key]
    made = ["--output", str(tmp_path / "merged")]
    assert main(["merge", str(package.folder), str(tiny_model), *given, *made]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'merged'} (changed: model.safetensors)\n"
    done = merge(package, values, tiny_model, tmp_path / "by-function")
    for path in done.folder.iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes(), path.name
    made = ["--base-model", "base", "--output", str(tmp_path / "adapter")]
    assert main(["adapter", str(package.folder), *given, *made]) == 0
    adapter = write_adapter(package, values, tmp_path / "adapter-by-function", "base")
    for path in adapter.iterdir():
        assert path.read_bytes() == (tmp_path / "adapter" / path.name).read_bytes(), path.name
    for command, more in (("merge", [str(tiny_model)]), ("adapter", ["--base-model", "base"])):
        words = [
            command,
            str(package.folder),
            *more,
            *given,
            "--output",
            str(tmp_path / "few"),
            "--rank",
            "1",
        ]
        assert main(words) == ConfigError.exit_code
        assert "have one rank alone; export it with --slice lora" in capsys.readouterr().err
    assert not (tmp_path / "few").exists()
