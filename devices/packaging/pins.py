"""Makes devices/packaging/device.txt: the packages that a device loads, pinned as in constraints.txt.

``tokenizers`` and ``onnxruntime`` declare packages that a device never loads (a hub client, protocol buffers). pip
would install them all, so devices take this file with ``--no-deps``: ``python -m devices.packaging.pins``.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS, PINS = ROOT / "constraints.txt", Path(__file__).with_name("device.txt")
#: What the runtime imports, directly or not; docs/decisions/0005-dependencies.md has each one's reason.
PACKAGES = ("cffi", "cryptography", "msgspec", "numpy", "onnxruntime", "safetensors", "tokenizers", "urllib3")
HEAD = """\
# All that a device installs, for: pip install --no-deps --require-hashes -r device.txt
# Made by `make constraints`; do not edit.
"""


def pins() -> str:
    """The file's text.

    Raises:
        ValueError: constraints.txt does not pin a package.
    """
    blocks = re.findall(
        r"^([\w.-]+)==[^\n]*(?:\n    --hash=[^\n]*)*\n", CONSTRAINTS.read_text(), re.MULTILINE
    )
    texts = re.findall(r"^[\w.-]+==[^\n]*(?:\n    --hash=[^\n]*)*\n", CONSTRAINTS.read_text(), re.MULTILINE)
    pinned = dict(zip(blocks, texts, strict=True))
    if missing := [name for name in PACKAGES if name not in pinned]:
        raise ValueError(f"constraints.txt pins no {missing[0]}; run make constraints")
    return HEAD + "".join(pinned[name] for name in PACKAGES)


if __name__ == "__main__":
    PINS.write_text(pins())
