"""``edge-runtime support-bundle``: what helps somebody else to help, in one file, without secrets and without rows."""

from __future__ import annotations

import io
import platform
import tarfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime import __version__
from edge_runtime.agent.config import DeviceConfig, load_config
from edge_runtime.agent.doctor import Diagnosis
from edge_runtime.agent.host import Host
from edge_runtime.agent.status import read_status
from edge_runtime.decoding import MALFORMED
from edge_runtime.durable import write_durably
from edge_runtime.errors import EdgeError
from edge_runtime.package.prepared import PREPARED
from edge_runtime.protocol.messages import Text

#: Libraries whose versions matter.
LIBRARIES = (
    "onnxruntime",
    "executorch",
    "numpy",
    "tokenizers",
    "msgspec",
    "urllib3",
    "cryptography",
    "psutil",
)
#: Keys of the configuration that are told as set or not, and never by their value.
HIDDEN = ("enrolment_token", "data_query")
#: What is told of a prepared package: nothing of its weights.
PREPARED_FIELDS = (
    "package_sha256",
    "engine",
    "cpu",
    "arithmetic",
    "weight_limit",
    "candidates",
    "calibration",
)


class Versions(msgspec.Struct, frozen=True):
    """What runs here.

    Attributes:
        program: version of this program.
        python: version of Python.
        system: the kernel's name, release and machine.
        board: what the machine calls itself.
        libraries: versions of the libraries that are installed.
    """

    program: Text
    python: Text
    system: Text
    board: Text
    libraries: dict[str, str]


class Bundle(msgspec.Struct, frozen=True):
    """A bundle that was written.

    Attributes:
        path: its path.
        bytes: its size.
    """

    path: str
    bytes: int


def write_support_bundle(
    config_path: Path, output: Path, diagnoses: Iterable[Diagnosis], host: Host | None = None
) -> None:
    """Write a ``.tar.gz`` with versions, diagnoses, status, configuration and what preparing a package measured.

    What cannot be read is replaced by its error: a bundle is for machines on which something is wrong.

    Args:
        config_path: the device's configuration.
        output: file to write, as a whole.
        diagnoses: what the doctor found.
        host: the machine; None takes this one.

    Raises:
        OSError: the file cannot be written.
    """
    parts: dict[str, Any] = {"versions.json": _versions(host or Host()), "doctor.json": list(diagnoses)}
    try:
        config = load_config(config_path)
        parts["config.json"] = _told(config)
        parts["status.json"] = read_status(config_path)
        for path in sorted((config.state_folder / "prepared").glob(f"*/{PREPARED}")):
            parts[f"prepared/{path.parent.name}.json"] = _prepared(path)
    except EdgeError as error:
        parts["error.json"] = {"kind": type(error).__name__, "message": str(error)}
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as bundle:
        for name, part in parts.items():
            content = msgspec.json.format(msgspec.json.encode(part, enc_hook=str), indent=2) + b"\n"
            entry = tarfile.TarInfo(f"edge-runtime-support/{name}")
            entry.size = len(content)
            bundle.addfile(entry, io.BytesIO(content))
    write_durably(output, data.getvalue(), mode=0o600)


def _versions(host: Host) -> Versions:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Versions(__version__, platform.python_version(), system, host.board, found)


def _told(config: DeviceConfig) -> dict[str, Any]:
    """The configuration without what is nobody's business."""
    fields: dict[str, Any] = msgspec.structs.asdict(config)
    return {**fields, **{name: None if fields[name] is None else "set, and not told" for name in HIDDEN}}


def _prepared(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    except (OSError, *MALFORMED) as error:
        return {"error": type(error).__name__}
    return {name: found.get(name) for name in PREPARED_FIELDS}
