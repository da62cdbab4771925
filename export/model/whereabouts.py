"""Where beneath a path what was looked for lies, as the rest of a sentence that says that it is not there.

People name a file for its folder, the folder of a whole training, a hub's cache, or a name on a hub.
"""

from __future__ import annotations

import re
from pathlib import Path

#: Where trainers keep each step, sentence-transformers its encoder, peft each adapter, and hubs each revision.
BENEATH = ("*", "snapshots/*")
_ON_A_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def elsewhere(folder: Path, name: str) -> str:
    """Where a file lies that a folder lacks; empty if that is not known.

    Args:
        folder: path that was named.
        name: name of the file.
    """
    if folder.is_file():
        return f"; it is a file: give the folder that it lies in, {folder.parent}"
    if not folder.exists():
        if _ON_A_HUB.fullmatch(str(folder)) is None:
            return ""
        return f"; if it is a name on a hub, download it: hf download {folder} --local-dir DIR, and give DIR"
    places = sorted(path.parent for pattern in BENEATH for path in folder.glob(f"{pattern}/{name}"))
    if not places:
        return ""
    return f"; {len(places)} folders in it have one, the last of them is {max(places, key=_step)}: give that"


def _step(place: Path) -> tuple[int, str]:
    """Orders ``checkpoint-500`` before ``checkpoint-1000``."""
    number = re.search(r"(\d+)$", place.name)
    return (int(number[1]) if number else -1, place.name)
