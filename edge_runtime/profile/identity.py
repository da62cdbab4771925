"""What a memory report says about the machine, the package and the program that it was measured with."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec

from edge_runtime import __version__
from edge_runtime.engines.choice import engine_version
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import ConfigError
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import cpu_type
from edge_runtime.profile.document import ProfileIdentity

#: Files in which boards and PCs name their model.
_MODELS = (Path("/proc/device-tree/model"), Path("/sys/class/dmi/id/product_name"))


def identify(
    package: Package, arithmetic: str, command: str, engine: EngineName = "onnxruntime"
) -> ProfileIdentity:
    """The identity of a measurement on this machine.

    Args:
        package: package that is measured.
        arithmetic: arithmetic that it runs in.
        command: command line that repeats the measurement.
        engine: name of the engine that it runs on.

    Raises:
        ConfigError: the command is too long for a report, or holds characters that no terminal prints.
    """
    identity = ProfileIdentity(
        device=_model(),
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=f"{cpu_type()}, {len(os.sched_getaffinity(0))} usable",
        page_size_bytes=os.sysconf("SC_PAGE_SIZE"),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        runtime_version=__version__,
        engine=engine_version(engine),
        package_name=package.manifest.name,
        package_sha256=package.sha256,
        arithmetic=arithmetic,
        command=command,
    )
    try:
        return msgspec.convert(msgspec.to_builtins(identity), ProfileIdentity)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the report cannot say what was measured: {error}") from error


def _model() -> str:
    """Model of the board or PC; the architecture where the system does not tell it."""
    for path in _MODELS:
        try:
            text = path.read_text(errors="replace").strip("\0 \n")
        except OSError:
            continue
        if text:
            return text
    return platform.machine()
