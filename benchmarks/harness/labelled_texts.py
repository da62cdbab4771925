"""TREC questions and SST-2 sentences as rows to train on, from a folder that the caller names."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

from coordinator.simulation.labelled_rows import LabelledRows


def read_trec(folder: Path, *, fine: bool = False) -> LabelledRows:
    """TREC's training questions (Li and Roth 2002), from lines "LABEL:fine text".

    Args:
        folder: folder of the data sets.
        fine: whether rows get the whole label, of which there are 50, or the coarse class before the colon, one of six.
    """
    path = folder / "trec" / "TREC.train"
    pairs = [line.split(" ", 1) for line in read_text(path, "latin-1").splitlines() if line.strip()]
    return _rows(
        path, [text for _, text in pairs], [label if fine else label.partition(":")[0] for label, _ in pairs]
    )


def read_sst2(folder: Path) -> LabelledRows:
    """SST-2's training sentences (Socher et al. 2013) and phrases of them; 0 is negative and 1 positive."""
    path = folder / "sst2" / "train.tsv"
    lines = csv.DictReader(read_text(path, "utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    pairs = [(line["sentence"].strip(), line["label"]) for line in lines]
    return _rows(path, [text for text, _ in pairs], [label for _, label in pairs])


READERS = {"TREC": read_trec, "SST-2": read_sst2}


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a data set's file; if it cannot be read, the program ends with a line that names it and --data."""
    try:
        return path.read_text(encoding)
    except OSError as error:
        raise SystemExit(
            f"error: cannot read {path}: {error.strerror}; name the folder of the data sets with --data"
        ) from None


def _rows(path: Path, texts: list[str], labels: list[str]) -> LabelledRows:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LabelledRows(path, tuple(texts), tuple(labels), None, digest)
