"""Packages without programs: what adapters and merges are made of, a second instead of a whole export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from msgspec import UNSET

from edge_runtime.data.batches import Batch
from edge_runtime.package.manifest import FORMAT_VERSION, Base, Features, Manifest, Program, Variant
from edge_runtime.package.package import Package
from edge_runtime.package.slices import Values, shapes
from export.model.features import choose_features
from export.model.load import load_model
from export.model.slices import SliceOptions
from export.packaging import export_package
from export.packaging.torch_reference import TorchReference
from export.packaging.weights import write_segments
from export.quantisation.stored import StoredModel, store
from tests.export import tiny


@dataclass(frozen=True)
class Unlowered:
    """A float package of a folder, without programs, and the captured model."""

    package: Package
    stored: StoredModel

    def values(self, size: float = 0.1) -> Values:
        """Values of every slice, moved off their start as after a long run."""
        generator = np.random.default_rng(5)
        start = tiny.flat({name: self.stored.tensors[name] for name in self._trainable()})
        return {
            name: (start[name] + size * generator.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes(self.package.manifest.slices).items()
        }

    def logits(self, values: Values, batch: Batch) -> np.ndarray:
        """What the package's programs compute, by torch."""
        names = {next(iter(tiny.flat({name: torch.zeros(1)}))): name for name in self._trainable()}
        slices = {names[flat]: torch.from_numpy(value) for flat, value in values.items()}
        reference = TorchReference(self.stored.plain, self.stored.tensors)
        return reference.run(tiny.torch_batch(batch), slices)["logits"].numpy()

    def _trainable(self) -> list[str]:
        return [source for segment in self.stored.segments for source in segment.slices.values()]


def make(
    model: Path,
    folder: Path,
    labels: tuple[str, ...],
    targets: tuple[str, ...] = (),
    own: bool = True,
    kind: str = "lora",
) -> Unlowered:
    """The package of a folder with slices of rank 2, or of a twentieth of the entries.

    Args:
        model: model folder.
        folder: folder to create.
        labels: label set.
        targets: modules to adapt; empty for query and value.
        own: whether the head goes on from the folder's own classifier.
        kind: kind of the slices.
    """
    choice = choose_features(model, labels)
    features: Features | None = "own" if own else choice.features
    rows = choice.rows if own and choice.rows is not None else ()
    options = SliceOptions(kind=kind, rank=2, density=0.05, targets=targets)
    loaded = load_model(model, len(labels), options, features=features, rows=rows)
    stored = store(loaded, "none")
    (folder / "weights").mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    segments = write_segments(folder, stored, [{"primal": "none"}] * len(stored.segments), lambda _: None)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="unlowered",
        task="classification",
        labels=labels,
        sequence_limit=32,
        pad_token_id=0,
        base=Base(
            loaded.architecture, model.name, loaded.parameters, loaded.hidden_size, "none", loaded.causal
        ),
        files=export_package._list_files(folder),
        programs={"none": Program((), (), {"float": Variant("none.onnx", ())})},
        segments=segments,
        slices=export_package._slice_specs(stored, kind, loaded.classifier),
        tokenizer="tokenizer.json",
        initial_state="slices.safetensors",
        self_checks={},
        probe="programs/probe.onnx",
        features=export_package._stated(loaded),
        own_labels=export_package._in_order_of_classes(labels, loaded.rows),
    )
    assert (manifest.features == "own") == own or manifest.features is UNSET
    return Unlowered(Package(folder, manifest, ""), stored)
