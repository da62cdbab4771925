"""Data of the learning bench: classification tasks as JSON lines, and speakers of Shakespeare for a decoder.

Test splits are never touched: where a data set has no dev split, 1,000 training rows are cut off by a fixed seed.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness.labelled_texts import read_sst2, read_text, read_trec
from coordinator.simulation.labelled_rows import LabelledRows

DEV_ROWS = 1000
#: Label and text of a row.
Pair = tuple[str, str]


@dataclass(frozen=True)
class TaskData:
    """A task's files.

    Attributes:
        train: training rows, each with ``text`` and ``label``.
        dev: rows for evaluation, in the same form.
        labels: JSON array of the label set.
    """

    train: Path
    dev: Path
    labels: Path


def sst2(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """SST-2 (GLUE): training rows and GLUE's own dev split."""
    lines = read_text(folder / "sst2" / "dev.tsv").splitlines()[1:]
    dev = [(label, text.strip()) for label, text in (line.split("\t", 1) for line in lines) if text.strip()]
    return _pairs(read_sst2(folder)), dev


def ag_news(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """AG News: its pool of training rows, cut in two."""
    lines = read_text(folder / "ag_news" / "train_pool.csv").splitlines(keepends=True)
    return _cut([(row["label"], row["text"].strip()) for row in csv.DictReader(lines)])


def banking77(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """banking77: its training rows, cut in two."""
    lines = read_text(folder / "banking77" / "train.csv").splitlines(keepends=True)
    return _cut([(row["category"], row["text"].strip()) for row in csv.DictReader(lines)])


def trec(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """TREC: its training rows with their coarse classes, cut in two."""
    return _cut(_pairs(read_trec(folder)))


def trec_fine(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """TREC: its training rows with their fine classes, cut in two."""
    return _cut(_pairs(read_trec(folder, fine=True)))


def clinc150(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """CLINC150: its training rows with the 150 intents that are in scope, cut in two."""
    found = json.loads(read_text(folder / "clinc150" / "derived_train_val.json"))["train"]
    return _cut([(label, text.strip()) for text, label in found])


def newsgroups(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """20 Newsgroups: subject and text of its training rows, cut in two."""
    lines = read_text(folder / "20news" / "derived_train.jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    return _cut([(row["label"], f"{row['subject']} {row['text']}".strip()) for row in rows])


def injongo(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """Injongo: intents in eight languages, most of which the encoder was not made for; 1,000 of its own dev rows."""
    parts = []
    for name in ("train", "dev"):
        paths = sorted((folder / "injongo").glob(f"*/{name}.jsonl"))
        rows = [json.loads(line) for path in paths for line in read_text(path).splitlines()]
        parts.append([(row["intent"], row["text"].strip()) for row in rows])
    return parts[0], _mixed(parts[1])[:DEV_ROWS]


def sib200(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """SIB-200: topics of sentences in twenty languages; 1,000 of its own dev rows."""
    parts = []
    for name in ("train", "dev"):
        paths = sorted((folder / "sib200").glob(f"*/{name}.tsv"))
        lines = [line for path in paths for line in read_text(path).splitlines()[1:]]
        parts.append([(topic, text.strip()) for _, topic, text in (line.split("\t", 2) for line in lines)])
    return parts[0], _mixed(parts[1])[:DEV_ROWS]


TASKS = {
    "trec": trec,
    "trec_fine": trec_fine,
    "sst2": sst2,
    "ag_news": ag_news,
    "banking77": banking77,
    "clinc150": clinc150,
    "newsgroups": newsgroups,
    "injongo": injongo,
    "sib200": sib200,
}


def prepare(task: str, data: Path, output: Path) -> TaskData:
    """Write a task's files; the same data give the same bytes.

    Raises:
        SystemExit: the data set is not under ``data``.
    """
    train, dev = TASKS[task](data)
    output.mkdir(parents=True, exist_ok=True)
    files = TaskData(output / "train.jsonl", output / "dev.jsonl", output / "labels.json")
    files.labels.write_text(json.dumps(sorted({label for label, _ in (*train, *dev)})))
    for path, rows in ((files.train, train), (files.dev, dev)):
        _write(path, ({"text": text, "label": label} for label, text in rows if text))
    return files


def languages(data: Path, output: Path, train: Iterable[str], others: Iterable[str]) -> TaskData:
    """Write SIB-200's topics in some languages, with the language as each row's owner.

    Args:
        data: folder of the data sets.
        output: folder to write to.
        train: languages of the training rows, by their code there.
        others: languages of dev rows alone; those of ``train`` have dev rows too.
    """
    train, others = tuple(train), tuple(others)
    parts = {
        name: [
            {"text": row["text"], "label": row["category"], "owner": language}
            for language in found
            for row in csv.DictReader(
                read_text(data / "sib200" / language / f"{name}.tsv").splitlines(),
                delimiter="\t",
                quoting=csv.QUOTE_NONE,
            )
        ]
        for name, found in (("train", train), ("dev", (*train, *others)))
    }
    output.mkdir(parents=True, exist_ok=True)
    files = TaskData(output / "train.jsonl", output / "dev.jsonl", output / "labels.json")
    files.labels.write_text(json.dumps(sorted({row["label"] for rows in parts.values() for row in rows})))
    for path, rows in ((files.train, parts["train"]), (files.dev, parts["dev"])):
        _write(path, rows)
    return files


def speakers(data: Path, output: Path, rows_at_least: int = 8) -> tuple[Path, Path]:
    """Write TinyShakespeare's speeches, with their speakers as owners.

    Args:
        data: folder of the data sets.
        output: folder to write to.
        rows_at_least: fewest speeches of a speaker; others are left out.

    Returns:
        The file of training rows, and that of dev rows, which are every tenth speech.
    """
    text = read_text(data / "tinyshakespeare" / "input.txt")
    said: dict[str, list[str]] = {}
    for part in re.split(r"\n\s*\n", text):
        name, _, speech = part.strip().partition(":\n")
        if speech.strip():
            said.setdefault(name.strip(), []).append(speech.strip())
    train, dev = [], []
    for name, speeches in sorted(said.items()):
        if len(speeches) >= rows_at_least:
            dev += [{"text": speech} for speech in speeches[::10]]
            train += [{"text": s, "owner": name} for i, s in enumerate(speeches) if i % 10]
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "train.jsonl", train)
    _write(output / "dev.jsonl", dev)
    return output / "train.jsonl", output / "dev.jsonl"


def _pairs(rows: LabelledRows) -> list[Pair]:
    return list(zip(rows.labels or (), rows.texts, strict=True))


def _cut(rows: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Training and dev rows, by a permutation of seed 0."""
    mixed = _mixed(rows)
    return mixed[DEV_ROWS:], mixed[:DEV_ROWS]


def _mixed(rows: list[Pair]) -> list[Pair]:
    """The rows in the order of a permutation of seed 0."""
    order = np.random.Generator(np.random.Philox(0)).permutation(len(rows))
    return [rows[i] for i in order]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
