"""Adapter folders that cannot start a package: each is refused by name; and those that can, with the right scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import SliceSpec, TensorSpec
from export.adapters.read import Wanted, read_adapter
from export.adapters.start_values import start_values
from tests.export import peft_models, tiny

pytestmark = pytest.mark.filterwarnings(peft_models.OLD_NAME)

WANTED = Wanted(tiny.shared_model(), "bert", "classification", tiny.LABELS)
QUERIES = tuple(f"encoder.layer.{block}.attention.self.query" for block in range(2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of rank 4 that peft wrote for the queries of the tiny BERT."""
    model = tiny.make_model("bert", vocab_size=60)
    return peft_models.write_random_adapter(
        model, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=["query"]
    )


def refuse(folder: Path, wanted: Wanted = WANTED) -> str:
    """The message with which a folder is refused, one line."""
    with pytest.raises(ModelError) as caught:
        read_adapter(folder, wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    """Replace tensors, named without what peft puts before them; None removes one."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path) | {f"base_model.model.{name}": value for name, value in changes.items()}
    save_file({name: value for name, value in found.items() if value is not None}, path)


def test_what_peft_writes_is_read(folder: Path) -> None:
    """Rank, scale alpha / r, and every pair, under the names of the model without a head."""
    adapter = read_adapter(folder, WANTED)
    assert (adapter.rank, adapter.scale, tuple(sorted(adapter.pairs))) == (4, 1.5, QUERIES)
    assert adapter.head is None
    for pair in adapter.pairs.values():
        assert (pair.a.shape, pair.b.shape) == ((4, tiny.HIDDEN), (tiny.HIDDEN, 4))
        assert pair.a.dtype == pair.b.dtype == np.float32


def test_rank_stabilised_scale_divides_by_the_root(folder: Path) -> None:
    """With use_rslora the update is scaled by alpha / sqrt(r), as peft does."""
    change_config(folder, use_rslora=True)
    assert read_adapter(folder, WANTED).scale == 3.0


def test_half_precision_is_widened(folder: Path) -> None:
    """A float16 adapter gives the same numbers in float32."""
    path = folder / "adapter_model.safetensors"
    save_file({name: value.astype(np.float16) for name, value in load_file(path).items()}, path)
    for module, pair in read_adapter(folder, WANTED).pairs.items():
        stored = load_file(path)[f"base_model.model.{module}.lora_A.weight"]
        np.testing.assert_array_equal(pair.a, stored.astype(np.float32))
        assert pair.a.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "of peft type IA3"),
        ({"peft_type": None}, "of peft type None"),
        ({"use_dora": True}, "sets use_dora to True"),
        ({"modules_to_save": ["embeddings"]}, "names 'embeddings' in modules_to_save, and"),
        ({"rank_pattern": {"0.attention.self.query": 2}}, "rank 2, which adapter_config.json gives it"),
        ({"alpha_pattern": {"0.attention.self.query": 2}}, "has alpha_pattern: rank 4 and scale 0.5 for"),
        ({"layers_to_transform": [0]}, "adapts encoder.layer.1.attention.self.query, which target_modules"),
        ({"layers_to_transform": 0}, "adapts encoder.layer.1.attention.self.query, which target_modules"),
        (
            {"layers_to_transform": [0, 1], "layers_pattern": "h"},
            "adapts encoder.layer.0.attention.self.query",
        ),
        (
            {"layers_to_transform": [0, 1], "target_modules": ".*query"},
            "has layers_to_transform beside target",
        ),
        ({"exclude_modules": ["query"]}, "adapts encoder.layer.0.attention.self.query, which target_modules"),
        (
            {"exclude_modules": r".*\.1\..*"},
            "adapts encoder.layer.1.attention.self.query, which target_modules",
        ),
        ({"exclude_modules": "(["}, "exclude_modules of"),
        ({"rank_pattern": {"([": 4}}, "rank_pattern of"),
        ({"lora_bias": True}, "sets lora_bias to True"),
        ({"invented_tomorrow": {"a": 1}}, "sets invented_tomorrow to"),
        ({"bias": "all"}, "trains biases (bias 'all')"),
        ({"init_lora_weights": "pissa_niter_4"}, "starts from 'pissa_niter_4', which changes the base model"),
        ({"r": 0}, "$.r"),
        ({"r": 10**9}, "$.r"),
        ({"r": "4"}, "$.r"),
        ({"lora_alpha": -1}, "$.lora_alpha"),
        ({"target_modules": ["query", "key"]}, "targets 'key', for which"),
        ({"target_modules": ["value"]}, "adapts encoder.layer.0.attention.self.query, which target_modules"),
        ({"target_modules": r".*\.layer\.0\..*query"}, "adapts encoder.layer.1.attention.self.query"),
        ({"target_modules": "(["}, "is no regular expression"),
        ({"target_modules": 7}, "$.target_modules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_a_package_cannot_express_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    """Whatever a configuration switches on beyond plain LoRA is named, also a field nobody has heard of yet."""
    change_config(folder, **changes)
    assert message in refuse(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{QUERIES[0]}.lora_B.weight": None},
            "has lora_A of encoder.layer.0.attention.self.query, but not",
        ),
        ({f"{QUERIES[0]}.lora_A.weight": np.ones((3, 64), np.float32)}, "has A (3, 64)"),
        ({f"{QUERIES[0]}.lora_B.weight": np.ones((64, 4, 1), np.float32)}, "B (64, 4, 1)"),
        ({f"{QUERIES[0]}.lora_magnitude_vector": np.ones(64, np.float32)}, "lora_magnitude_vector; only"),
        ({"embeddings.lora_embedding_A": np.ones((4, 9), np.float32)}, "lora_embedding_A; only"),
        (
            {f"{QUERIES[1]}.lora_A.weight": np.full((4, 64), np.nan, np.float32)},
            "256 values that are not finite",
        ),
        ({f"{QUERIES[1]}.lora_A.weight": np.ones((4, 64), np.int8)}, "adapters are floating point"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    """Half a pair, another rank, another kind of tensor, NaNs and integers are refused with the tensor's name."""
    change_tensors(folder, **changes)
    assert message in refuse(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "noise"])
def test_damaged_folders_are_refused(folder: Path, name: str, damage: str) -> None:
    """A file that is missing, cut off or something else is named."""
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\x00\xff" * 40)
    assert name in refuse(folder)


def write_head(folder: Path, labels: tuple[str, ...], /, **changes: object) -> None:
    features = "mean of last hidden states over real tokens, divided by its root mean square"
    described = {"labels": labels, "features": features, **changes}
    (folder / "head.json").write_text(json.dumps(described))
    weight = np.arange(len(labels) * 8, dtype=np.float32).reshape(len(labels), 8)
    parts = {"weight": weight, "bias": np.arange(len(labels), dtype=np.float32)}
    save_file(parts, folder / "head.safetensors")


def test_a_head_follows_the_order_of_labels(folder: Path) -> None:
    """A head for the same labels in another order gives each label its own row."""
    write_head(folder, tuple(reversed(tiny.LABELS)))
    head = read_adapter(folder, WANTED).head
    assert head is not None
    np.testing.assert_array_equal(head["bias"], [2, 1, 0])
    np.testing.assert_array_equal(head["weight"][:, 0], [16, 8, 0])


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        (("bad", "good"), {}, "is for 2 labels that are not those of --labels"),
        (("bad", "good", "fine"), {}, "is for 3 labels that are not those of --labels"),
        (
            tiny.LABELS,
            {"features": "something else"},
            "does not describe a head that 'edge-export adapter' wrote",
        ),
        (tiny.LABELS, {"labels": "bad"}, "does not describe a head"),
    ],
)
def test_a_head_of_another_kind_is_refused(
    folder: Path, labels: tuple[str, ...], changes: dict[str, object], message: str
) -> None:
    """A head for other labels, or made from other features, is refused with what to do."""
    write_head(folder, labels, **changes)
    assert message in refuse(folder)


def test_a_language_model_takes_no_head(folder: Path) -> None:
    """A package without labels ignores a head, and names modules as the class with an output layer does."""
    write_head(folder, ("x", "y"))
    adapter = read_adapter(folder, Wanted(WANTED.model, "bert", "causal_lm", ()))
    assert adapter.head is None
    assert (
        adapter.notes[-1]
        == "The adapter's classifier is not used: a language model has none (head.safetensors)"
    )
    assert set(adapter.pairs) == {f"bert.{name}" for name in QUERIES}


def specs(*targets: str, sides: tuple[int, int] = (64, 64)) -> tuple[SliceSpec, ...]:
    out, inputs = sides
    parts = (TensorSpec("A", (1, 4, inputs), "A"), TensorSpec("B", (1, out, 4), "B"))
    return tuple(SliceSpec(target, "lora", (1,), target, parts) for target in targets)


def no_factors(_: SliceSpec, name: str) -> Any:
    raise AssertionError(f"LoRA slices have no frozen {name}")


def test_names_must_match_both_ways(folder: Path) -> None:
    """A slice without a pair, a pair without a slice, and a pair of other sides are refused by name."""
    adapter = read_adapter(folder, WANTED)
    assert set(start_values(adapter, specs(*QUERIES), no_factors)) == {
        f"{name}/{part}" for name in QUERIES for part in "AB"
    }
    for made, message in (
        (specs(*QUERIES, "encoder.layer.9"), "no factors for slice encoder.layer.9"),
        (specs(QUERIES[0]), f"adapts {QUERIES[1]}, which is no linear layer"),
        (specs(*QUERIES, sides=(64, 32)), r"has A \(1, 4, 64\) for .*, the model needs \(1, 4, 32\)"),
    ):
        with pytest.raises(ModelError, match=message):
            start_values(adapter, made, no_factors)
