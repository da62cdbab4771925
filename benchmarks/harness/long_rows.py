"""Rows of real text, each long enough to fill a sequence: banking77 questions, joined."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import tokenizers

BANKING77 = Path(__file__).parents[2] / "examples" / "banking77"
LABELS = BANKING77 / "categories.json"


def write_full_rows(path: Path, tokenizer: Path, tokens: int, count: int) -> None:
    """Write ``count`` JSONL rows of at least ``tokens`` tokens; each has the label of its first question.

    Args:
        path: file to write.
        tokenizer: ``tokenizer.json`` that counts the tokens.
        tokens: fewest tokens of a row.
        count: number of rows.
    """
    counter = tokenizers.Tokenizer.from_file(str(tokenizer))
    counter.no_truncation()
    counter.no_padding()
    with (BANKING77 / "train.csv").open(newline="", encoding="utf-8") as file:
        questions = [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]
    # The file is sorted by label: a stride that shares no factor with its length mixes them.
    mixed = (questions[i * 7919 % len(questions)] for i in range(len(questions)))
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        text, label = next(mixed)
        while len(counter.encode(text).ids) < tokens:
            text += " " + next(mixed)[0]
        rows.append({"text": text, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
