"""A bill of materials of what a device installs, in CycloneDX 1.6 (ECMA-424): names, versions, digests and licences.

It is read from the wheels themselves. What their makers tell of what they have built in (Python's PEP 770) stands below
them, and so do the shared libraries that they carry. No tool for it is used: those that are well kept look at an
installed environment, and for another processor there is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from devices.packaging.wheels import metadata

#: What the old field for licences, free text and classifiers, means in SPDX's words.
SPDX = {"MIT License": "MIT", "Apache Software License": "Apache-2.0", "BSD License": "BSD-3-Clause"}
#: Where a wheel's maker puts bills of materials of what is built in.
INNER_BILLS = ".dist-info/sboms/"
NAMESPACE = uuid.UUID("6f0ad8f0-3a5e-4d0e-9d2c-0c6c5d7d9d11")


def write_bill(wheels: Sequence[Path], path: Path) -> None:
    """Write the bill of materials of some wheels; the same wheels and ``SOURCE_DATE_EPOCH`` give the same bytes.

    Raises:
        KeyError: ``SOURCE_DATE_EPOCH`` is not set.
        ValueError: a wheel does not tell its licence.
    """
    components = sorted((_component(wheel) for wheel in wheels), key=lambda each: each["name"])
    own = next(each for each in components if each["name"] == "edge-runtime")
    others = [each for each in components if each is not own]
    made = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    digests = "".join(each["hashes"][0]["content"] for each in components)
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, digests)}",
        "version": 1,
        "metadata": {"timestamp": made.strftime("%Y-%m-%dT%H:%M:%SZ"), "component": own},
        "components": others,
        "dependencies": [
            {"ref": own["bom-ref"], "dependsOn": [each["bom-ref"] for each in others]},
            *({"ref": each["bom-ref"]} for each in others),
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(bill, indent=1, ensure_ascii=False) + "\n", "utf-8")
    path.chmod(0o644)


def _component(wheel: Path) -> dict[str, Any]:
    told = metadata(wheel)
    address = f"pkg:pypi/{told['Name'].lower()}@{told['Version']}"
    component = {
        "type": "application" if told["Name"] == "edge-runtime" else "library",
        "bom-ref": f"{address}?file_name={wheel.name}",
        "name": told["Name"],
        "version": told["Version"],
        "purl": address,
        "licenses": [{"expression": licence(told)}],
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}],
    }
    inner = [*_told_inside(wheel), *_carried(wheel)]
    return {**component, "components": inner} if inner else component


def licence(told: Message) -> str:
    """The licence of a package as an SPDX expression.

    Raises:
        ValueError: its metadata does not tell one, or in words that are not known here.
    """
    words = told["License-Expression"] or told["License"] or ""
    if not words:
        classifiers = told.get_all("Classifier", [])
        words = next((each.rpartition(":: ")[2] for each in classifiers if each.startswith("License ::")), "")
    expression = told["License-Expression"] or SPDX.get(words)
    if not expression:
        raise ValueError(
            f"{told['Name']} {told['Version']} states its licence as {words!r}; name it in SPDX's words"
        )
    return str(expression)


def _told_inside(wheel: Path) -> Iterator[dict[str, Any]]:
    """What a wheel's own bills of materials name, each once."""
    seen = set()
    with ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if INNER_BILLS not in name or not name.endswith(".json"):
                continue
            for each in json.loads(archive.read(name)).get("components", []):
                kept = {
                    key: each[key] for key in ("type", "name", "version", "purl", "licenses") if each.get(key)
                }
                identity = (kept.get("name"), kept.get("version"))
                if identity not in seen and {"type", "name"} <= set(kept):
                    seen.add(identity)
                    yield kept


def _carried(wheel: Path) -> Iterator[dict[str, Any]]:
    """Shared libraries that a wheel carries beside its own."""
    with ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            folder, _, file = name.rpartition("/")
            if folder.endswith(".libs") and ".so" in file:
                digest = hashlib.sha256(archive.read(name)).hexdigest()
                yield {"type": "library", "name": file, "hashes": [{"alg": "SHA-256", "content": digest}]}
