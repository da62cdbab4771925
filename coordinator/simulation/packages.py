"""The packages of a simulation, gathered in its output folder: signed by its own key, and laid out for this machine."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from coordinator.simulation.arm import locked
from edge_runtime.durable import rename_durably
from edge_runtime.engines.choice import engine_maker
from edge_runtime.execution.prepare import prepare
from edge_runtime.package.manifest import MANIFEST, SIGNATURE, Arithmetic
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import is_current
from edge_runtime.protocol.signing import PrivateKey, generate_key

KEY, PACKAGES, PREPARED = "publisher.key", "packages", "prepared"


@dataclass(frozen=True)
class SimulationPackages:
    """The packages below an output folder: ``packages/SHA256`` and, laid out for this machine, ``prepared/SHA256``.

    An arm's package need not come with its publisher's key: whoever simulates names the folder, and the manifest's
    digest says what it was. The copy here is signed anew, so that the coordinator can check it as it always does.

    Attributes:
        folder: output folder.
        key: key that signs the copies.
    """

    folder: Path
    key: PrivateKey

    @property
    def copies(self) -> Path:
        """Folder of the copies."""
        return self.folder / PACKAGES

    @property
    def prepared(self) -> Path:
        """Folder of what was laid out."""
        return self.folder / PREPARED

    def take_in(self, source: Path, arithmetic: Arithmetic | None, cap_bytes: int, threads: int) -> Package:
        """Copy a package here and prepare it, unless that was done.

        Args:
            source: package folder that the configuration names.
            arithmetic: arithmetic in which to run it; None measures which is best.
            cap_bytes: memory that devices grant; arithmetics that could not train under it are not considered.
            threads: threads of the engine that measures.

        Raises:
            ArtefactError: the package is malformed or damaged.
            PreparationError: it cannot be run here.
        """
        package = Package.open_unsigned(source)
        folder = self.copies / package.sha256
        with locked(self.copies, wait=True):
            if not folder.is_dir():
                package.verify_files()
                rename_durably(self._copy(package), folder)
            copy = Package.open(folder, self.key.public_key).for_engine("onnxruntime")
            prepared = self.prepared / package.sha256
            if not is_current(prepared, package.sha256, arithmetic):
                prepare(copy, prepared, engine_maker("onnxruntime")(threads), arithmetic, cap_bytes)
        return copy

    def _copy(self, package: Package) -> Path:
        work = self.copies / f".{package.sha256}"
        shutil.rmtree(work, ignore_errors=True)
        for name in package.manifest.files:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package.path(name), work / name)
        shutil.copyfile(package.folder / MANIFEST, work / MANIFEST)
        (work / SIGNATURE).write_text(self.key.sign((work / MANIFEST).read_bytes()) + "\n", "ascii")
        return work


def open_packages(folder: Path) -> SimulationPackages:
    """The packages of an output folder, which is made if missing, with its key."""
    with locked(folder / PACKAGES, wait=True):
        path = folder / KEY
        if not path.exists():
            generate_key().save(path)
        return SimulationPackages(folder, PrivateKey.load(path))
