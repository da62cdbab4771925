"""peft adapters as people bring them: each is taken as peft takes it, named where a part is not used, or refused.

What is taken is compared with peft: the updates of every layer, scale·B·A, are the differences that peft's own
``merge_and_unload`` makes. What is refused is refused with a way out, and the way out is gone in the test.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import TaskKind
from edge_runtime.protocol.signing import generate_key
from export.adapters.read import Adapter, Wanted, check_adapter, read_adapter
from export.model.load import load_model
from export.model.slices import SliceOptions
from export.packaging import export_package as export_package_module
from tests.export import peft_models, tiny

pytestmark = [
    pytest.mark.filterwarnings(peft_models.OLD_NAME),
    # peft warns of what it does by itself in these situations; what it does is what is compared.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
LABELS = ("a", "b", "c")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "bert": lambda **more: BertConfig(**SIZES, **more),
    "roberta": lambda **more: RobertaConfig(**SIZES, **more),
    "distilbert": lambda **more: DistilBertConfig(
        vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32, **more
    ),
    "llama": lambda **more: LlamaConfig(**{**SIZES, "num_key_value_heads": 1, "pad_token_id": 0, **more}),
    "gte": lambda **more: AutoConfig.for_model("gte", **SIZES, pad_token_id=0, **more),
    "gpt2": lambda **more: GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, **more
    ),
}
CLASSES = {
    "classifier": AutoModelForSequenceClassification,
    "language": AutoModelForCausalLM,
    "plain": AutoModel,
}
Base = tuple[Path, str, str]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Base]:
    """Folders of tiny random models, by family and by what they are saved as; each is made once."""
    made: dict[tuple[str, str], Base] = {}

    def base(family: str, kind: str) -> Base:
        if (family, kind) not in made:
            torch.manual_seed(3)
            labels = {"num_labels": 3} if kind == "classifier" else {}
            model = CLASSES[kind].from_config(CONFIGS[family](**labels))
            folder = tmp_path_factory.mktemp("bases") / f"{family}-{kind}"
            model.save_pretrained(folder)
            made[family, kind] = folder, family, kind
        return made[family, kind]

    return base


def load(base: Base) -> Any:
    """A base as an adapter's user loads it."""
    return CLASSES[base[2]].from_pretrained(base[0], local_files_only=True).eval()


def train(base: Base, folder: Path, config: Any, **saving: Any) -> Path:
    """An adapter that peft saved, every number of which it trains moved away from its start."""
    model = get_peft_model(load(base), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, **saving)
    return folder


def wanted(base: Base, task: TaskKind | None = None) -> Wanted:
    """What a package of a base is made for."""
    chosen = task or ("causal_lm" if base[2] == "language" else "classification")
    return Wanted(base[0], base[1], chosen, LABELS if chosen == "classification" else ())


def change(folder: Path, **fields: Any) -> Path:
    """Change fields of a configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def rewrite(folder: Path, rename: Callable[[str], str]) -> Path:
    """Give all tensors other names."""
    path = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    return folder


def refuse(folder: Path, chosen: Wanted) -> str:
    """The one line with which an adapter is refused from its headers alone."""
    with pytest.raises(ModelError) as caught:
        check_adapter(folder, chosen)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_as_peft_merges(adapter: Adapter, base: Base, folder: Path) -> None:
    """Every weight that peft's merging moves is moved by the adapter's pair of that layer, and no other is."""
    before = dict(load(base).state_dict())
    after = PeftModel.from_pretrained(load(base), str(folder)).merge_and_unload().state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    outside = {
        name for name in moved if not any(name.endswith(f"{module}.weight") for module in adapter.pairs)
    }
    head = adapter.saved_head
    named = () if head is None else (*head.tensors, *(f"{module}.weight" for module in head.pairs))
    assert outside <= set(named)
    assert adapter.pairs
    for module, pair in adapter.pairs.items():
        name = next(name for name in before if name.endswith(f"{module}.weight"))
        difference = (after[name] - before[name]).numpy()
        update = adapter.scale * pair.b @ pair.a
        update = update.T if base[1] == "gpt2" else update
        assert np.abs(update).max() > 1e-3
        np.testing.assert_allclose(difference, update, atol=2e-6)


QUERY = {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 8}
PROJECTIONS = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}
#: Adapters that are taken: name, family and class of the base, settings of peft, and what the notes say.
TAKEN = (
    # huggingface/sentence-transformers#3980, huggingface/peft#2289: peft adds modules_to_save by itself.
    ("SEQ_CLS, BERT", "bert", "classifier", {**QUERY, "task_type": "SEQ_CLS"}, None),
    (
        "SEQ_CLS, RoBERTa's head of two layers",
        "roberta",
        "classifier",
        {**QUERY, "task_type": "SEQ_CLS"},
        None,
    ),
    (
        "SEQ_CLS, Llama's score",
        "llama",
        "classifier",
        {**PROJECTIONS, "task_type": "SEQ_CLS"},
        None,
    ),
    # huggingface/peft#577: the list names something else, and peft adds the classifiers.
    (
        "SEQ_CLS and the pooler",
        "bert",
        "classifier",
        {**QUERY, "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]},
        None,
    ),
    # huggingface/transformers#48595: all linear layers, among them the pooler, which is the head's.
    (
        "SEQ_CLS, all-linear",
        "bert",
        "classifier",
        {"target_modules": "all-linear", "r": 2, "task_type": "SEQ_CLS"},
        None,
    ),
    (
        "SEQ_CLS, DistilBERT's head of two layers",
        "distilbert",
        "classifier",
        {"target_modules": ["q_lin"], "r": 2, "task_type": "SEQ_CLS"},
        None,
    ),
    # huggingface/peft#427, huggingface/peft#2155
    ("layers_to_transform", "llama", "language", {**PROJECTIONS, "layers_to_transform": [1]}, None),
    ("layers_to_transform as a number", "llama", "language", {**PROJECTIONS, "layers_to_transform": 0}, None),
    (
        "layers_pattern",
        "llama",
        "plain",
        {**PROJECTIONS, "layers_to_transform": [1], "layers_pattern": "layers"},
        None,
    ),
    # huggingface/peft#873, huggingface/peft#2550: patterns that come to one rank and scale.
    (
        "patterns of one rank and scale",
        "bert",
        "plain",
        {**QUERY, "rank_pattern": {"query": 2, "value": 2}, "alpha_pattern": {"query": 3, "value": 3}},
        None,
    ),
    # huggingface/peft#3582
    (
        "a pattern that fits nothing",
        "bert",
        "plain",
        {**QUERY, "alpha_pattern": {"^query": 100}},
        "fit no adapted module",
    ),
    (
        "targets as an expression",
        "bert",
        "plain",
        {"target_modules": r".*layer\.1\..*(query|output\.dense)", "r": 2},
        None,
    ),
    (
        "exclude_modules",
        "bert",
        "classifier",
        {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"], "r": 2},
        None,
    ),
    (
        "a list of names for many families",
        "llama",
        "language",
        {**PROJECTIONS, "target_modules": ["q_proj", "c_attn", "query_key_value"]},
        None,
    ),
    ("rank-stabilised", "llama", "language", {**PROJECTIONS, "use_rslora": True}, None),
    (
        "fan_in_fan_out for GPT-2",
        "gpt2",
        "language",
        {"target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True},
        None,
    ),
    # none found: a folder that keeps query, key and value as one matrix under other names.
    ("GTE", "gte", "plain", PROJECTIONS, None),
    ("MiCA", "bert", "plain", {**QUERY, "init_lora_weights": "mica"}, None),
    ("orthogonal", "bert", "plain", {**QUERY, "init_lora_weights": "orthogonal"}, None),
)


@pytest.mark.parametrize(
    ("family", "kind", "settings", "note"), [row[1:] for row in TAKEN], ids=[r[0] for r in TAKEN]
)
def test_taken_as_peft_takes_it(
    bases: Any, tmp_path: Path, family: str, kind: str, settings: dict[str, Any], note: str | None
) -> None:
    """Pairs and scale are peft's, and what is not used is named in one line."""
    base = bases(family, kind)
    folder = train(base, tmp_path / "adapter", LoraConfig(**settings))
    adapter = read_adapter(folder, wanted(base))
    assert_as_peft_merges(adapter, base, folder)
    about = [line for line in adapter.notes if "says that it is for" not in line]
    assert (len(about) == 1 and note in about[0]) if note else not about, adapter.notes
    assert all("\n" not in line for line in adapter.notes)


def test_a_nulled_field_is_what_peft_makes_of_it(bases: Any, tmp_path: Path) -> None:
    """Without modules_to_save the head is found; without layers_to_transform the other layers are named."""
    base = bases("bert", "classifier")
    folder = train(base, tmp_path / "head", LoraConfig(**QUERY, task_type="SEQ_CLS"))
    adapter = read_adapter(change(folder, modules_to_save=None), wanted(base))
    assert adapter.saved_head is not None
    assert set(adapter.saved_head.tensors) == {"classifier.weight", "classifier.bias"}
    assert_as_peft_merges(adapter, base, folder)

    base = bases("llama", "language")
    folder = train(base, tmp_path / "layers", LoraConfig(**PROJECTIONS, layers_to_transform=[1]))
    adapter = read_adapter(change(folder, layers_to_transform=None), wanted(base))
    assert any("no tensors of 2 layers" in line and "model.layers.0" in line for line in adapter.notes)
    assert_as_peft_merges(adapter, base, folder)


@pytest.mark.parametrize(
    ("family", "targets", "tensors", "pairs"),
    [
        ("bert", "all-linear", ("classifier.weight", "classifier.bias"), ("bert.pooler.dense",)),
        (
            "roberta",
            QUERY["target_modules"],
            tuple(
                f"classifier.{name}"
                for name in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
            ),
            (),
        ),
        ("llama", PROJECTIONS["target_modules"], ("score.weight",), ()),
        # peft saves every module whose name ends in "classifier".
        (
            "distilbert",
            ["q_lin"],
            ("classifier.weight", "classifier.bias", "pre_classifier.weight", "pre_classifier.bias"),
            (),
        ),
    ],
)
def test_the_saved_head_has_the_numbers_that_peft_loads(
    bases: Any, tmp_path: Path, family: str, targets: Any, tensors: tuple[str, ...], pairs: tuple[str, ...]
) -> None:
    """Tensors of the head, under the names of the class with a head, and pairs of its layers, are peft's."""
    base = bases(family, "classifier")
    folder = train(base, tmp_path / "adapter", LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS"))
    head = read_adapter(folder, wanted(base)).saved_head
    assert head is not None
    assert (head.task_type, set(head.tensors), set(head.pairs)) == ("SEQ_CLS", set(tensors), set(pairs))
    merged = PeftModel.from_pretrained(load(base), str(folder)).merge_and_unload().state_dict()
    for name, values in head.tensors.items():
        np.testing.assert_array_equal(values, merged[name].numpy())


def test_a_head_is_no_part_of_a_language_model(bases: Any, tmp_path: Path) -> None:
    """A classifier's adapter can start a language model, and an output layer's a classifier; each is named."""
    classifier, language = bases("llama", "classifier"), bases("llama", "language")
    folder = train(classifier, tmp_path / "classifier", LoraConfig(**PROJECTIONS, task_type="SEQ_CLS"))
    notes = read_adapter(folder, wanted(language)).notes
    assert any("not used: a language model has none (score.weight)" in line for line in notes)
    settings = {**PROJECTIONS, "target_modules": ["q_proj", "lm_head"]}
    folder = train(language, tmp_path / "language", LoraConfig(**settings, task_type="CAUSAL_LM"))
    adapter = read_adapter(folder, wanted(language, "classification"))
    assert any("output layer is not used: a classifier has none (lm_head, " in line for line in adapter.notes)
    assert set(adapter.pairs) == {f"layers.{block}.self_attn.q_proj" for block in range(2)}


#: How training tools name tensors: thread, and the name that they make of peft's.
NAMES = (
    ("huggingface/peft#2962", lambda name: f"_orig_mod.{name}"),
    ("MakazhanAlpamys/Soup#335", lambda name: name.replace(".weight", ".default.weight")),
    ("huggingface/peft#286", lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.")),
    ("none found: DDP", lambda name: f"module.{name}"),
    ("none found: FSDP", lambda name: name.replace("layers.", "layers._fsdp_wrapped_module.")),
    (
        "none found: checkpointing",
        lambda name: name.replace("self_attn", "_checkpoint_wrapped_module.self_attn"),
    ),
    ("none found: no root", lambda name: name.removeprefix("base_model.model.")),
)


@pytest.mark.parametrize("rename", [row[1] for row in NAMES], ids=[row[0] for row in NAMES])
def test_wrapped_names_are_the_same_adapter(bases: Any, tmp_path: Path, rename: Callable[[str], str]) -> None:
    """Names as training tools write them give the pairs that peft reads from its own names."""
    base = bases("llama", "language")
    plain = train(base, tmp_path / "plain", LoraConfig(**PROJECTIONS))
    wrapped = rewrite(Path(shutil.copytree(plain, tmp_path / "wrapped")), rename)
    assert_as_peft_merges(read_adapter(wrapped, wanted(base)), base, plain)


# ggml-org/llama.cpp#4940, ggml-org/llama.cpp#3319, InternLM/lmdeploy#2851
def test_a_pytorch_file_is_taken(bases: Any, tmp_path: Path) -> None:
    """adapter_model.bin is read as peft reads it; beside a safetensors file it is named as not used."""
    base = bases("llama", "language")
    folder = train(base, tmp_path / "adapter", LoraConfig(**PROJECTIONS), safe_serialization=False)
    assert [path.name for path in folder.glob("adapter_model.*")] == ["adapter_model.bin"]
    assert_as_peft_merges(read_adapter(folder, wanted(base)), base, folder)
    train(base, folder, LoraConfig(**PROJECTIONS, use_rslora=True))
    adapter = read_adapter(folder, wanted(base))
    assert any("adapter_model.bin is not used: peft takes" in line for line in adapter.notes)
    assert_as_peft_merges(adapter, base, folder)


# huggingface/peft#298, huggingface/transformers#28531
def test_the_folder_of_a_step_is_named(bases: Any, tmp_path: Path) -> None:
    """A trainer's folder is refused with the folder of its last step, and that folder is taken."""
    base = bases("bert", "plain")
    for step in (9, 10):
        train(base, tmp_path / f"run/checkpoint-{step}", LoraConfig(**QUERY))
    message = refuse(tmp_path / "run", wanted(base))
    place = Path(message.partition("the last of them is ")[2].removesuffix(": give that"))
    assert place == tmp_path / "run/checkpoint-10"
    assert_as_peft_merges(read_adapter(place, wanted(base)), base, place)


def test_fan_in_fan_out_where_no_layer_has_it(bases: Any, tmp_path: Path) -> None:
    """peft switches it off for linear layers with a warning; the same pairs are taken with a note."""
    base = bases("bert", "plain")
    folder = change(train(base, tmp_path / "adapter", LoraConfig(**QUERY)), fan_in_fan_out=True)
    adapter = read_adapter(folder, wanted(base))
    assert any("fan_in_fan_out of" in line and "bert has no such layers" in line for line in adapter.notes)
    assert_as_peft_merges(adapter, base, folder)


#: Adapters that peft can merge and a package cannot express: base, settings or another class, what is named.
MERGED = (
    ("DoRA", ("bert", "plain"), {**QUERY, "use_dora": True}, "sets use_dora to True"),
    ("bias of B", ("bert", "plain"), {**QUERY, "lora_bias": True}, "sets lora_bias to True"),
    ("all biases", ("bert", "plain"), {**QUERY, "bias": "all"}, "trains biases (bias 'all')"),
    (
        "biases of layers",
        ("bert", "plain"),
        {**QUERY, "bias": "lora_only"},
        "trains biases (bias 'lora_only')",
    ),
    # huggingface/peft#2898
    (
        "tokens",
        ("llama", "language"),
        {**PROJECTIONS, "trainable_token_indices": [1, 2]},
        "sets trainable_token_indices",
    ),
    (
        "parameters",
        ("llama", "language"),
        {
            **PROJECTIONS,
            "target_parameters": ["q_proj.weight"],
            "target_modules": [],
        },
        "sets target_parameters",
    ),
    (
        "BD-LoRA",
        ("llama", "language"),
        {**PROJECTIONS, "use_bdlora": peft.tuners.lora.config.BdLoraConfig(["q_proj"], ["v_proj"], 2)},
        "sets use_bdlora",
    ),
    (
        "VeLoRA",
        ("bert", "plain"),
        {**QUERY, "velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
        "sets velora_config",
    ),
    (
        "KaSA",
        ("bert", "plain"),
        {**QUERY, "kasa_config": peft.tuners.lora.config.KasaConfig()},
        "sets kasa_config",
    ),
    # huggingface/peft#2550, axolotl-ai-cloud/axolotl#3673
    (
        "rank_pattern",
        ("bert", "plain"),
        {**QUERY, "rank_pattern": {"query": 2}},
        "has rank_pattern: rank 2 and scale 4",
    ),
    (
        "alpha_pattern",
        ("bert", "plain"),
        {**QUERY, "alpha_pattern": {"value": 2}},
        "has alpha_pattern: rank 4 and scale 2",
    ),
    # predibase/lorax#231, turboderp-org/exllamav2#534
    (
        "output layer and embedding saved whole",
        ("llama", "language"),
        {**PROJECTIONS, "modules_to_save": ["lm_head", "embed_tokens"]},
        "lm_head.weight, trained as a whole",
    ),
    (
        "embedding of a classifier",
        ("bert", "classifier"),
        {**QUERY, "task_type": "SEQ_CLS", "modules_to_save": ["word_embeddings"]},
        "word_embeddings.weight, trained as a whole",
    ),
    (
        "norms saved whole",
        ("llama", "language"),
        {**PROJECTIONS, "modules_to_save": ["input_layernorm"]},
        "input_layernorm.weight, trained as a whole",
    ),
    (
        "output layer with a pair",
        ("llama", "language"),
        {**PROJECTIONS, "target_modules": ["q_proj", "lm_head"]},
        "adapts lm_head, the model's output layer",
    ),
    (
        "embedding with a pair",
        ("llama", "language"),
        {**PROJECTIONS, "target_modules": ["q_proj", "embed_tokens"]},
        "lora_embedding_A",
    ),
    (
        "a rank above a side",
        ("llama", "language"),
        {**PROJECTIONS, "r": 12},
        "with rank 12, above the smaller side of the layer, 8",
    ),
    (
        "IA3",
        ("bert", "plain"),
        peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        "of peft type IA3",
    ),
    (
        "AdaLoRA",
        ("bert", "plain"),
        peft.AdaLoraConfig(target_modules=["query"], total_step=9, tinit=1, tfinal=2),
        "of peft type ADALORA",
    ),
    ("LoHa", ("bert", "plain"), peft.LoHaConfig(target_modules=["query"]), "of peft type LOHA"),
    ("LoKr", ("bert", "plain"), peft.LoKrConfig(target_modules=["query"]), "of peft type LOKR"),
    (
        "OFT",
        ("bert", "plain"),
        peft.OFTConfig(target_modules=["query"], oft_block_size=4),
        "of peft type OFT",
    ),
    ("VeRA", ("bert", "plain"), peft.VeraConfig(target_modules=["query"]), "of peft type VERA"),
    ("HRA", ("bert", "plain"), peft.HRAConfig(target_modules=["query"]), "of peft type HRA"),
    ("norms", ("bert", "plain"), peft.LNTuningConfig(target_modules=["LayerNorm"]), "of peft type LN_TUNING"),
)


@pytest.mark.parametrize(
    ("base", "settings", "message"), [row[1:] for row in MERGED], ids=[row[0] for row in MERGED]
)
def test_what_a_package_cannot_express_is_taken_once_it_is_merged(
    bases: Any, tmp_path: Path, base: tuple[str, str], settings: Any, message: str
) -> None:
    """The refusal says to merge with peft; the merged folder is a model whose every weight is peft's."""
    chosen = bases(*base)
    config = LoraConfig(**settings) if isinstance(settings, dict) else settings
    folder = train(chosen, tmp_path / "adapter", config)
    said = refuse(folder, wanted(chosen))
    assert message in said
    assert "merge it into the model with peft (PeftModel.from_pretrained, merge_and_unload)" in said
    adapted = PeftModel.from_pretrained(load(chosen), str(folder)).eval()
    ids = torch.arange(2, 12).reshape(2, 5)
    with torch.no_grad():
        expected = adapted(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        merged = adapted.merge_and_unload()
        found = merged(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    task: TaskKind = "causal_lm" if chosen[2] == "language" else "classification"
    model = load_model(tmp_path / "merged", 3, SliceOptions(rank=2), task)
    for name, parameter in model.module.encoder.named_parameters():
        if parameter.is_meta and not name.startswith("pooler."):
            own = name.replace(".linear.", ".")
            kept = next(tensor for key, tensor in merged.state_dict().items() if key.endswith(own))
            assert torch.equal(model.tensor(f"encoder.{name}"), kept), name


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_prompts_cannot_be_merged_and_lora_can_be_trained(bases: Any, tmp_path: Path, kind: str) -> None:
    """What learns prompts changes no weight; the way out is another adapter, and that is taken."""
    base = bases("llama", "language")
    classes = {"PREFIX_TUNING": peft.PrefixTuningConfig, "PROMPT_TUNING": peft.PromptTuningConfig}
    folder = train(base, tmp_path / "prompts", classes[kind](task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert f"of peft type {kind}" in (message := refuse(folder, wanted(base)))
    assert message.endswith("train a LORA adapter instead")
    read_adapter(train(base, tmp_path / "lora", LoraConfig(**PROJECTIONS)), wanted(base))


# huggingface/peft#1929, huggingface/peft#2075
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_of_a_changed_base_is_taken_once_it_is_converted(
    bases: Any, tmp_path: Path, start: str
) -> None:
    """Both ways out: converted by peft it starts on the model, and as it is on the changed model itself."""
    base = bases("bert", "plain")
    model = get_peft_model(load(base), LoraConfig(**QUERY, init_lora_weights=start))
    model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "plain")
    assert f"starts from {start!r}, which changes the base model" in refuse(tmp_path / "plain", wanted(base))

    converted = tmp_path / "converted"
    model.save_pretrained(converted, path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    assert_as_peft_merges(read_adapter(converted, wanted(base)), base, converted)

    changed = Path(shutil.copytree(base[0], tmp_path / "changed")), *base[1:]
    model.unload().save_pretrained(changed[0])
    folder = change(tmp_path / "plain", init_lora_weights=True)
    assert_as_peft_merges(read_adapter(folder, wanted(changed)), changed, folder)


# huggingface/peft#1554
def test_an_embedding_that_was_saved_and_not_trained_loses_nothing(bases: Any, tmp_path: Path) -> None:
    """save_embedding_layers repeats the model's own tensors: equal ones are taken, others are refused by name."""
    base = bases("llama", "language")
    folder = train(base, tmp_path / "adapter", LoraConfig(**PROJECTIONS), save_embedding_layers=True)
    assert_as_peft_merges(read_adapter(folder, wanted(base)), base, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        tensors | {name: t.to(torch.bfloat16) for name, t in tensors.items() if "lora" not in name}, path
    )
    read_adapter(folder, wanted(base))
    name = "base_model.model.model.embed_tokens.weight"
    save_file(tensors | {name: tensors[name] + 1}, path)
    with pytest.raises(ModelError, match=f"holds {name}, trained as a whole beside the pairs"):
        read_adapter(folder, wanted(base))


# huggingface/peft#2898, huggingface/peft#1147
def test_a_changed_vocabulary_is_refused_with_both_sizes(bases: Any, tmp_path: Path) -> None:
    """An adapter of a model with more tokens names both counts; resized and merged as it says, the model has them."""
    base = bases("llama", "language")
    model = load(base)
    model.resize_token_embeddings(43)
    adapted = get_peft_model(model, LoraConfig(**PROJECTIONS, modules_to_save=["embed_tokens", "lm_head"]))
    adapted.save_pretrained(tmp_path / "adapter")
    message = refuse(tmp_path / "adapter", wanted(base))
    assert "with 43 rows, and the model has 40" in message
    assert "Call resize_token_embeddings(43) on the model, then merge it into the model" in message
    model = load(base)
    model.resize_token_embeddings(43)
    merged = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_model(tmp_path / "merged", 0, SliceOptions(rank=2), "causal_lm")
    assert loaded.tensor("encoder.model.embed_tokens.weight").shape == (43, 16)


# huggingface/peft#2962: weights that are silently not used.
def test_tensors_that_fit_nothing_are_refused(bases: Any, tmp_path: Path) -> None:
    """A tensor of no module, and one of a module that the model lacks, are refused rather than passed over."""
    base = bases("bert", "plain")
    folder = train(base, tmp_path / "adapter", LoraConfig(**QUERY))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, message in (
        ("base_model.model.adapter.gate.weight", "which fits no module of"),
        (
            "base_model.model.encoder.layer.0.attention.self.query.bias",
            "only base_model.model.MODULE.lora_A.weight",
        ),
        ("base_model.model.encoder.layer.1.attention.output.LayerNorm.weight", "give the model that"),
    ):
        save_file(tensors | {name: torch.ones(3)}, path)
        assert message in (said := refuse(folder, wanted(base)))
        assert name in said


def test_an_adapter_of_another_model_is_refused_at_once(bases: Any, tmp_path: Path) -> None:
    """Another family and another hidden size are told from headers, with both models."""
    base = bases("llama", "language")
    other = train(bases("gpt2", "language"), tmp_path / "gpt2", LoraConfig(r=2, target_modules=["c_attn"]))
    message = refuse(other, wanted(base))
    assert "adapts transformer.h.0.attn.c_attn, and" in message
    assert f"{base[0]} has no such layer; its base_model_name_or_path is" in message
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(CONFIGS["llama"](hidden_size=32)).save_pretrained(tmp_path / "wide")
    wide = tmp_path / "wide", "llama", "language"
    folder = train(wide, tmp_path / "adapter", LoraConfig(**PROJECTIONS))
    assert "a layer of 32 inputs and 32 outputs; in" in (message := refuse(folder, wanted(base)))
    assert f"{base[0]} it has 16 and 16; its base_model_name_or_path is {wide[0]}" in message
    assert_as_peft_merges(read_adapter(folder, wanted(wide)), wide, folder)


# ModelTC/LightX2V's report in vllm-project/vllm-omni#6476: r contradicts the tensors.
def test_a_rank_that_contradicts_the_tensors_is_refused(bases: Any, tmp_path: Path) -> None:
    """r in the configuration and the sides of A and B state one fact; corrected as the message says, it is taken."""
    base = bases("bert", "plain")
    folder = change(train(base, tmp_path / "adapter", LoraConfig(**QUERY)), r=8)
    assert "rank 8, which adapter_config.json gives it, needs (8, inputs)" in refuse(folder, wanted(base))
    assert_as_peft_merges(read_adapter(change(folder, r=4), wanted(base)), base, folder)


def test_another_tokenizer_and_another_base_are_named(bases: Any, tmp_path: Path) -> None:
    """Tokens that only the adapter's tokenizer has, and a base of another name, are one line each."""
    base = bases("bert", "plain")
    model = Path(shutil.copytree(base[0], tmp_path / "model"))
    folder = train(base, tmp_path / "adapter", LoraConfig(**QUERY))
    for place, tokens in ((model, ["[PAD]"]), (folder, ["[PAD]", "<think>"])):
        added = [{"id": index, "content": token} for index, token in enumerate(tokens)]
        (place / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    change(folder, base_model_name_or_path="somebody/another-model")
    base_line, tokens_line = check_adapter(folder, Wanted(model, "bert", "classification", LABELS)).notes
    assert base_line == "The adapter says that it is for somebody/another-model; it starts on model"
    assert tokens_line.endswith("it lacks 1 tokens of the adapter's, the first is '<think>'")


def test_the_command_refuses_before_it_imports_torch(bases: Any, tmp_path: Path) -> None:
    """'edge-export package --adapter' tells it with neither torch nor transformers loaded."""
    base = bases("bert", "classifier")
    folder = change(train(base, tmp_path / "adapter", LoraConfig(**QUERY)), use_dora=True)
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    (tmp_path / "rows.jsonl").write_text('{"text": "a text", "label": "a"}\n')
    generate_key().save(tmp_path / "key")
    script = (
        "import sys; from export.cli import main; code = main(sys.argv[1:]); "
        "print(code, *sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    arguments = [
        *("package", base[0], "--labels", tmp_path / "labels.json", "--check-data", tmp_path / "rows.jsonl"),
        *("--output", tmp_path / "package", "--key", tmp_path / "key", "--adapter", folder),
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "31\n"
    assert "sets use_dora to True" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_not_used_is_printed_by_the_export(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export says each note once, before it loads the model."""
    base = bases("bert", "classifier")
    targets = {"r": 2, "target_modules": "all-linear"}
    folder = train(base, tmp_path / "adapter", LoraConfig(**targets, task_type="SEQ_CLS"))

    def stop(*_: object, **__: object) -> None:
        raise ModelError("far enough")

    monkeypatch.setattr(export_package_module, "load_model", stop)
    said: list[str] = []
    with pytest.raises(ModelError, match="far enough"):
        export_package_module.export_package(
            tiny.options(base[0], tmp_path / "package", adapter=folder), generate_key(), said.append
        )
    assert said[1].startswith("The adapter's classifier is not used: bert.pooler.dense has a pair of its own")
    assert len(said) == 2
