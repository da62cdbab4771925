"""What a publisher prepares: a tiny pretrained-like model, packages of it, and rows of banking77."""

from __future__ import annotations

import csv
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

from tests.end_to_end.harness import PATIENCE_S, ROOT, command

LABELS = ("card_arrival", "cash_withdrawal_charge", "declined_transfer", "age_limit")
Rows = list[dict[str, str]]
LOWERING_PATIENCE_S = 1500.0


@dataclass(frozen=True)
class Exported:
    """A package folder, and the public key that signed it."""

    folder: Path
    publisher_key: str


@dataclass
class Workshop:
    """A folder with a model, a signing key and packages; each package is exported once, when first asked for."""

    folder: Path
    publisher_key: str = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.publisher_key = command("export.cli", "key", self.folder / "publisher.key").stdout.strip()
        (self.folder / "labels.json").write_text(json.dumps(LABELS))
        write_rows(self.folder / "check.jsonl", rows()[:6])
        write_model(self.folder / "model")

    def package(self, kind: str = "lora_xs", quantisation: str = "int8") -> Exported:
        """The model with slices of a kind."""
        folder = self.folder / f"{kind}-{quantisation}"
        if not folder.exists():
            done = self.export(self.folder / "model", folder, "--slice", kind, "--quant", quantisation)
            assert done.returncode == 0, done.stderr
        return Exported(folder, self.publisher_key)

    def package_for_both_engines(self) -> Exported:
        """The same with LoRA-XS, for ONNX Runtime and ExecuTorch; lowering for the second takes longer."""
        folder = self.folder / "both-engines"
        if not folder.exists():
            options = ("--engine", "onnxruntime,executorch")
            done = self.export(self.folder / "model", folder, *options, patience_s=LOWERING_PATIENCE_S)
            assert done.returncode == 0, done.stderr
        return Exported(folder, self.publisher_key)

    def export(self, model: Path, output: Path, *options: object, patience_s: float = PATIENCE_S):
        """``edge-export package`` with this workshop's labels, key and check data."""
        return command(
            *("export.cli", "package", model, "--labels", self.folder / "labels.json", "--output", output),
            *("--check-data", self.folder / "check.jsonl", "--key", self.folder / "publisher.key"),
            *("--sequence-limit", 32, "--rank", 4, *options),
            patience_s=patience_s,
        )


@functools.cache
def open_workshop(folder: Path) -> Workshop:
    """The one workshop of a folder."""
    return Workshop(folder)


@functools.cache
def rows() -> Rows:
    """Rows of banking77 with one of LABELS, labels in turn."""
    with (ROOT / "examples/banking77/train.csv").open(newline="", encoding="utf-8") as file:
        found = [{"text": r["text"].strip(), "label": r["category"]} for r in csv.DictReader(file)]
    by_label = [[row for row in found if row["label"] == label] for label in LABELS]
    return [row for group in zip(*by_label, strict=False) for row in group]


def write_rows(path: Path, chosen: Rows) -> Path:
    """Write rows as a data file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), "utf-8")
    return path


def write_model(folder: Path, **changes: object) -> Path:
    """Save a random BERT of two blocks with a WordPiece vocabulary of banking77."""
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from tests.vocabulary import word_pieces

    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_pieces((row["text"] for row in rows()), 400), **special
    )
    tokenizer.save_pretrained(folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "initializer_range": 0.06,  # three times the usual, so that every layer matters
    }
    torch.manual_seed(7)
    BertModel(BertConfig(**{**sizes, **changes}), add_pooling_layer=False).save_pretrained(folder)
    return folder
