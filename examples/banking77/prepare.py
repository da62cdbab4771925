"""Cut banking77 into a dev split and one file a device.

The dev split has 1,000 rows, stratified by label. The rest is dealt to the devices by a Dirichlet label split:
for each label, shares over devices are drawn from Dirichlet(alpha). Same seed, same files.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
DEV_ROWS = 1000


@dataclass(frozen=True)
class Split:
    """The files of a split.

    Attributes:
        labels: JSON array of the label set.
        dev: held-out rows.
        devices: rows of each device.
    """

    labels: Path
    dev: Path
    devices: tuple[Path, ...]


def prepare(folder: Path, devices: int = 20, alpha: float = 1.0, seed: int = 0) -> Split:
    """Write ``labels.json``, ``dev.jsonl`` and ``device-NN.jsonl`` into ``folder``.

    Args:
        folder: folder to write to, made if missing.
        devices: number of devices.
        alpha: parameter of the Dirichlet split; the smaller, the more uneven.
        seed: seed of dev split and partition.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (HERE / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]
    rows = [row for row in rows if row[0]]
    labels = json.loads((HERE / "categories.json").read_text())
    by_label = {label: [i for i, row in enumerate(rows) if row[1] == label] for label in labels}

    generator = np.random.Generator(np.random.Philox(seed))
    dev = _stratified(by_label, len(rows), generator)
    held_out = set(dev)
    shares: list[list[int]] = [[] for _ in range(devices)]
    for label in labels:
        rest = generator.permutation([i for i in by_label[label] if i not in held_out])
        cuts = np.cumsum(generator.dirichlet([alpha] * devices))[:-1] * len(rest)
        for share, part in zip(shares, np.split(rest, cuts.astype(int)), strict=True):
            share.extend(part.tolist())

    split = Split(
        labels=folder / "labels.json",
        dev=folder / "dev.jsonl",
        devices=tuple(folder / f"device-{number:02d}.jsonl" for number in range(devices)),
    )
    split.labels.write_text(json.dumps(labels))
    _write(split.dev, [rows[i] for i in sorted(dev)])
    for path, share in zip(split.devices, shares, strict=True):
        if not share:
            raise SystemExit(
                f"error: the split leaves {path.name} empty; use fewer devices or a larger alpha"
            )
        _write(path, [rows[i] for i in sorted(share)])
    return split


def _stratified(by_label: dict[str, list[int]], total: int, generator: np.random.Generator) -> list[int]:
    """Draw DEV_ROWS rows, each label in proportion; counts are rounded up where the remainders are largest."""
    exact = {label: DEV_ROWS * len(members) / total for label, members in by_label.items()}
    counts = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(exact, key=lambda label: (counts[label] - exact[label], label))
    for label in by_remainder[: DEV_ROWS - sum(counts.values())]:
        counts[label] += 1
    chosen: list[int] = []
    for label, members in by_label.items():
        chosen.extend(generator.permutation(members)[: counts[label]].tolist())
    return chosen


def _write(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
