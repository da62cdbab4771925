"""What a configuration says of a module, compared with peft's own functions; no field of peft is overlooked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from edge_runtime.errors import ModelError
from export.adapters.settings import MERGE_FIRST, MERGEABLE, NEUTRAL, Settings, read_settings

MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.1.experts.0.down_proj",
    "layers.1.self_attn.q_proj",
    "bert.encoder.layer.1.output.dense",
    "bert.pooler.dense",
    "classifier.dense",
    "score",
)
#: Fields that are refused when they are on, and that peft cannot merge into the model.
NOT_MERGEABLE = {
    *("megatron_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "arrow_config"),
    "layer_replication",
}


def write(folder: Path, **fields: Any) -> Path:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | fields))
    return folder


def test_every_field_of_peft_is_read_neutral_or_refused() -> None:
    """Each field of the installed peft's LoraConfig is in exactly one group; a new one fails here."""
    groups = [set(Settings.__struct_fields__), set(NEUTRAL), set(MERGEABLE), NOT_MERGEABLE]
    for field in dataclasses.fields(LoraConfig):
        assert sum(field.name in group for group in groups) == 1, field.name


def test_no_default_of_peft_counts_as_switched_on(tmp_path: Path) -> None:
    """A plain configuration as the installed peft writes it is read with its rank, scale and targets."""
    LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]).save_pretrained(tmp_path)
    settings = read_settings(tmp_path)
    assert (settings.rank(MODULES[0]), settings.scale(MODULES[0])) == (4, 1.5)
    assert settings.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "dense"]},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": r".*\.layers\.\d+\..*(q|down)_proj"},
        {"target_modules": ["q_proj", "down_proj", "dense"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "down_proj", "dense"], "layers_to_transform": 11},
        {"target_modules": ["q_proj", "dense"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "dense"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "dense"], "layers_to_transform": [1], "layers_pattern": ["layers", "layer"]},
        {"target_modules": ["q_proj", "dense"], "layers_to_transform": [0], "layers_pattern": []},
        {"target_modules": ["q_proj", "dense"], "exclude_modules": ["pooler.dense"]},
        {"target_modules": ["q_proj", "dense"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj", "dense", "score"], "modules_to_save": ["classifier", "score"]},
        {"target_modules": r".*(dense|score)", "modules_to_save": ["pooler"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_adapted_is_what_peft_adapts(tmp_path: Path, fields: dict[str, Any]) -> None:
    """For lists, expressions, layers and exclusions, each module is adapted exactly if peft would adapt it."""
    settings, theirs = read_settings(write(tmp_path, **fields)), LoraConfig(**fields)
    ours = {module: settings.adapts(module) for module in MODULES}
    # peft answers with a match, or with an object that says why a module is excluded.
    peft = {module: check_target_module_exists(theirs, module) for module in MODULES}
    assert ours == {m: bool(found) and type(found).__name__ != "_ExcludedModule" for m, found in peft.items()}
    assert set(ours.values()) == {True, False}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_give_the_rank_and_scale_that_peft_gives(tmp_path: Path, use_rslora: bool) -> None:
    """The first key that fits the end of a module's name decides, for rank and alpha each on its own."""
    fields = {
        "rank_pattern": {"down_proj": 2, r"layers\.1\..*": 9, "q_proj": 16},
        "alpha_pattern": {r"0\.self_attn\.q_proj": 3, "dense": 5, "^model.q_proj": 100},
        "use_rslora": use_rslora,
    }
    settings = read_settings(write(tmp_path, **fields))
    for module in MODULES:
        rank = fields["rank_pattern"].get(get_pattern_key(fields["rank_pattern"], module), 4)
        alpha = fields["alpha_pattern"].get(get_pattern_key(fields["alpha_pattern"], module), 8)
        assert settings.rank(module) == rank
        assert settings.scale(module) == pytest.approx(alpha / (rank**0.5 if use_rslora else rank), rel=1e-15)
    assert settings.unused_patterns(MODULES) == ("^model.q_proj",)


def test_peft_saves_classifiers_by_itself(tmp_path: Path) -> None:
    """For a task with a classifier, 'classifier' and 'score' are saved whether the list names them or not."""
    assert read_settings(write(tmp_path, task_type="SEQ_CLS")).saves("classifier.out_proj")
    named = read_settings(write(tmp_path, task_type="SEQ_CLS", modules_to_save=["pooler"]))
    assert named.saved_modules() == ("pooler", "classifier", "score")
    assert not read_settings(write(tmp_path, task_type="CAUSAL_LM")).saves("score")


@pytest.mark.parametrize(
    ("fields", "way"),
    [
        ({"use_dora": True}, MERGE_FIRST),
        ({"alora_invocation_tokens": [1, 2]}, "train the adapter without it"),
        ({"peft_type": "LOHA"}, MERGE_FIRST),
        ({"peft_type": "PREFIX_TUNING"}, "train a LORA adapter instead"),
        ({"peft_type": "INVENTED"}, "train a LORA adapter instead"),
        ({"bias": "lora_only"}, MERGE_FIRST),
        ({"init_lora_weights": "olora"}, "have peft convert it to plain LoRA"),
        ({"init_lora_weights": "loftq"}, "changes the base model; if the model folder is that changed base"),
        ({"rank_pattern": {"q_proj": 0}}, "$.rank_pattern"),
        ({"layers_to_transform": ["0"]}, "$.layers_to_transform"),
    ],
    ids=str,
)
def test_each_refusal_names_a_way_out(tmp_path: Path, fields: dict[str, Any], way: str) -> None:
    """What cannot be expressed is refused in one line, with merging where peft can merge it."""
    with pytest.raises(ModelError) as caught:
        read_settings(write(tmp_path, **fields))
    assert way in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal", "mica", True, False])
def test_starts_that_leave_the_base_alone_are_taken(tmp_path: Path, start: bool | str) -> None:
    """How A and B were first drawn does not matter if the base stayed as it was, nor do settings of another start."""
    settings = read_settings(write(tmp_path, init_lora_weights=start, corda_config={"corda_method": "kpm"}))
    assert settings.init_lora_weights == start


def test_a_folder_above_the_adapter_says_where_it_lies(tmp_path: Path) -> None:
    """A trainer's output folder, or a file, is refused with the folder to give: the one of the last step."""
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write(tmp_path / f"checkpoint-{step}")
    with pytest.raises(
        ModelError, match=f"2 folders in it have one, the last of them is {tmp_path}/checkpoint-1000"
    ):
        read_settings(tmp_path)
    read_settings(tmp_path / "checkpoint-1000")
    file = tmp_path / "checkpoint-500/adapter_config.json"
    with pytest.raises(ModelError, match=f"give the folder that it lies in, {file.parent}"):
        read_settings(file)
