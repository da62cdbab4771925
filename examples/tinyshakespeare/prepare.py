"""Deal the speakers' passages: a dev split from each, and one file of text for each device.

A device holds whole speakers, as a person's phone holds that person's words. Same seed, same files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
#: Passages of each speaker that are held out.
DEV_ROWS = 20


@dataclass(frozen=True)
class Split:
    """The files of a split.

    Attributes:
        dev: held-out passages.
        devices: passages of each device.
    """

    dev: Path
    devices: tuple[Path, ...]


def prepare(folder: Path, devices: int = 10, seed: int = 0) -> Split:
    """Write ``dev.jsonl`` and ``device-NN.jsonl`` into ``folder``.

    Args:
        folder: folder to write to, made if missing.
        devices: number of devices, at most one a speaker; speaker ``i`` goes to device ``i mod devices``.
        seed: seed of the dev split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    speakers: dict[str, list[str]] = {}
    with (HERE / "lines.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            speakers.setdefault(row["speaker"], []).append(row["text"])
    if not 1 <= devices <= len(speakers):
        raise SystemExit(f"error: there are {len(speakers)} speakers, for 1 to {len(speakers)} devices")
    generator = np.random.Generator(np.random.Philox(seed))
    dev: list[str] = []
    shares: list[list[str]] = [[] for _ in range(devices)]
    for number, passages in enumerate(speakers.values()):
        order = generator.permutation(len(passages))
        dev.extend(passages[i] for i in order[:DEV_ROWS])
        shares[number % devices].extend(passages[i] for i in order[DEV_ROWS:])
    split = Split(folder / "dev.jsonl", tuple(folder / f"device-{n:02d}.jsonl" for n in range(devices)))
    for path, texts in ((split.dev, dev), *zip(split.devices, shares, strict=True)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        path.write_text("".join(lines), encoding="utf-8")
    return split
