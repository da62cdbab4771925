"""Models small enough to export in seconds, their packages, and the comparison of programs with torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from edge_runtime.data.batches import Batch, Row, Tokenizer, make_batch
from edge_runtime.data.rows import NO_LABEL
from edge_runtime.package.manifest import TaskKind
from edge_runtime.package.package import Package
from edge_runtime.protocol.messages import LocalOptimizer, Task
from edge_runtime.protocol.signing import PrivateKey, generate_key
from export.model.features import choose_features
from export.model.load import load_model
from export.model.slices import SliceOptions
from export.packaging.export_package import ExportOptions, export_package
from export.packaging.torch_reference import TorchReference
from export.quantisation.stored import StoredModel, store
from tests.shared_folders import digest_of, shared_folder
from tests.vocabulary import word_pieces

torch.set_num_threads(1)

LABELS = ("bad", "good", "mixed")
SENTENCES = (
    "the film is a quiet joy from start to finish",
    "a dull plot and worse acting",
    "i would gladly watch it again",
    "nothing in it works",
    "some scenes shine , others drag on far too long",
    "good",
    "the music alone is worth the ticket , the rest of it is not",
    "bad from the first line to the last",
)
HIDDEN, BLOCKS, HEADS, INNER, POSITIONS = 64, 2, 4, 128, 64
CHECK_TEXTS = SENTENCES[:4]
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "opt", "gpt2", "gemma3_text", "phi3")
ENCODERS = ("albert", "mpnet", "modernbert", "deberta-v2", "xlm-roberta", "gte", "nomic_bert")


@dataclass(frozen=True)
class Exported:
    """A package beside what it was made from; the model is captured again when a test first compares with torch."""

    package: Package
    key: PrivateKey
    chosen: ExportOptions

    @property
    def stored(self) -> StoredModel:
        """The segments that were lowered."""
        return self._captured[0]

    @property
    def reference(self) -> TorchReference:
        """Torch on the same stored weights."""
        return self._captured[1]

    @cached_property
    def _captured(self) -> tuple[StoredModel, TorchReference]:
        return store_model(self.chosen)


def write_model(
    folder: Path, family: str = "bert", task: TaskKind = "classification", **changes: object
) -> Path:
    """Save a random model of a family with a WordPiece tokenizer of SENTENCES.

    For language modelling it is saved with its output layer.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_pieces(SENTENCES, 160),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    make_model(family, task, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    return folder


def make_model(family: str, task: TaskKind = "classification", **changes: object) -> PreTrainedModel:
    """A random model; weights are drawn three times as wide as usual, so that every layer matters."""
    if family in DECODERS or family in ENCODERS:
        kind = AutoModelForCausalLM if task == "causal_lm" else AutoModel
        return kind.from_config(small_config(family, **changes))
    common = {"initializer_range": 0.06, "max_position_embeddings": POSITIONS, "pad_token_id": 0, **changes}
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
    }
    if family == "bert":
        return BertModel(BertConfig(**{**sizes, **common}), add_pooling_layer=False)
    if family == "roberta":
        return RobertaModel(RobertaConfig(**{**sizes, **common}), add_pooling_layer=False)
    sizes = {"dim": HIDDEN, "n_layers": BLOCKS, "n_heads": HEADS, "hidden_dim": INNER}
    return DistilBertModel(DistilBertConfig(**{**sizes, **common}))


def small_config(family: str, **changes: object) -> PretrainedConfig:
    """Configuration of a small decoder or encoder; ALBERT has one shared block, called three times."""
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.06,
        "pad_token_id": 0,
    }
    own: dict[str, dict[str, object]] = {
        "llama": {"intermediate_size": INNER, "num_key_value_heads": 2, "tie_word_embeddings": False},
        "qwen2": {"intermediate_size": INNER, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "qwen3": {"intermediate_size": INNER, "num_key_value_heads": 2, "head_dim": 16},
        "mistral": {"intermediate_size": INNER, "num_key_value_heads": 2, "sliding_window": 6},
        "opt": {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN, "dropout": 0.0, "init_std": 0.06},
        "gpt2": {"n_inner": INNER},
        "gemma3_text": {
            "intermediate_size": INNER,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "phi3": {
            "intermediate_size": INNER,
            "num_key_value_heads": 2,
            "original_max_position_embeddings": POSITIONS,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "albert": {"intermediate_size": INNER, "embedding_size": 32, "num_hidden_layers": 3},
        "mpnet": {"intermediate_size": INNER},
        "gte": {"intermediate_size": INNER},
        "nomic_bert": {"intermediate_size": INNER},
        "xlm-roberta": {"intermediate_size": INNER},
        "modernbert": {
            "intermediate_size": INNER,
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        },
        # As in deberta-v3-base, which has no absolute positions and no token types.
        "deberta-v2": {
            "intermediate_size": INNER,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    }
    return AutoConfig.for_model(family, **{**sizes, **own[family], **changes})


def options(model: Path, output: Path, **changes: object) -> ExportOptions:
    """Export options; ``kind``, ``rank``, ``targets`` and ``density`` go to the slices."""
    chosen = {name: changes.pop(name) for name in ("kind", "rank", "targets", "density") if name in changes}
    settings = {
        "labels": LABELS,
        "sequence_limit": 32,
        "quantisation": "int8",
        "check_texts": CHECK_TEXTS,
        **changes,
    }
    return ExportOptions(model=model, output=output, slices=SliceOptions(**chosen), **settings)


def store_model(chosen: ExportOptions) -> tuple[StoredModel, TorchReference]:
    """The segments an export lowers, and the torch reference on the same stored weights."""
    features = choose_features(chosen.model, chosen.labels).features
    model = load_model(
        chosen.model,
        len(chosen.labels),
        chosen.slices,
        chosen.task,
        features=features,
        mlp_topk=chosen.mlp_topk,
    )
    stored = store(model, chosen.quantisation)
    return stored, TorchReference(stored.segments, stored.in_memory())


def export(model: Path, output: Path, **changes: object) -> Exported:
    """Export a model folder."""
    chosen, key = options(model, output, **changes), generate_key()
    return Exported(export_package(chosen, key, lambda _: None), key, chosen)


def shared_model() -> Path:
    """The random BERT of two blocks, made once for all test processes; copy it to change it."""
    return shared_folder("model", (), lambda folder: write_model(folder / "tiny-bert")) / "tiny-bert"


def export_shared(model: Path, **changes: object) -> Exported:
    """The same as :func:`export`, made once for all test processes; copy the package to change it."""

    def make(folder: Path) -> None:
        exported = export(model, folder / "package", **changes)
        exported.key.save(folder / "publisher.key")

    folder = shared_folder("package", (digest_of(model), options(Path(), Path(), **changes)), make)
    key = PrivateKey.load(folder / "publisher.key")
    package = Package.open(folder / "package", key.public_key)
    return Exported(package, key, options(model, folder / "package", **changes))


def make_task(package: Package, **changes: object) -> Task:
    """A task on all slices of a package."""
    settings = {
        "task_id": "t-1",
        "run_id": "r-1",
        "round": 1,
        "slot": 0,
        "seed": 11,
        "package": package.sha256,
        "package_signature": "A" * 86 + "==",
        "state": "0" * 64,
        "slices": tuple(spec.name for spec in package.manifest.slices if spec.kind != "head"),
        "train_head": True,
        "steps": 2,
        "batch_size": 4,
        "draws": 2,
        "sequence_limit": 32,
        "optimizer": LocalOptimizer("sgd", 0.01, 0.1),
        "required_bytes": 0,
        "deadline_s": 600.0,
        **changes,
    }
    return Task(**settings)


def make_text_batch(package: Package, texts: tuple[str, ...] = SENTENCES) -> Batch:
    """Real text as the device would batch it, labels in turn."""
    manifest = package.manifest
    count = len(manifest.labels)
    rows = [Row(text, i % count if count else NO_LABEL) for i, text in enumerate(texts)]
    ids = Tokenizer(package.path(manifest.tokenizer), manifest.sequence_limit).encode(rows)
    labels = [row.label for row in rows] if count else None
    return make_batch(ids, labels, pad_token_id=manifest.pad_token_id)


def moved_slices(reference: TorchReference, seed: int = 3, size: float = 0.1) -> dict[str, torch.Tensor]:
    """Slice and head values away from their zeros, so that every path carries signal."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: reference.tensors[name] + size * torch.randn(reference.tensors[name].shape, generator=generator)
        for name in reference.trainable
    }


def flat(slices: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Trainable tensors under the flat names of the package."""
    return {
        "/".join(name.removeprefix("encoder.").rsplit(".", 1)): value.detach().numpy()
        for name, value in slices.items()
    }


def torch_batch(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as the torch reference takes it."""
    return {
        name: torch.from_numpy(getattr(batch, name)) for name in ("input_ids", "attention_mask", "labels")
    }


def backprop_jvps(
    reference: TorchReference, slices: dict[str, torch.Tensor], batch: Batch, tangents: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Loss (B,) and jvps (K, B) of each example as g·v, g by backpropagation."""
    loss, gradients = reference.example_gradients(torch_batch(batch), slices)
    jvps = sum(
        (tangents[name] * gradient).reshape(*tangents[name].shape[:2], -1).sum(-1)
        for name, gradient in flat(gradients).items()
        if name in tangents
    )
    return loss.numpy(), np.asarray(jvps)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected magnitude."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())
