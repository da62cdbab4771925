"""Child program: what training the same slices by backpropagation takes, for ``edge-runtime profile`` to compare with.

Reads :class:`edge_runtime.profile.comparisons.BackpropagationSettings` as JSON from standard input, takes AdamW steps
in PyTorch on the very batches that the profiled task takes, and writes its peak and step time as JSON.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import msgspec
import torch
from torch import Tensor, nn

from edge_runtime.data.batches import Tokenizer, draw_batches, load_rows
from edge_runtime.data.examples import Examples
from edge_runtime.errors import ModelError
from edge_runtime.exit_status import exit_code_of
from edge_runtime.memory.meter import status_bytes
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.package import Package
from edge_runtime.profile.comparisons import BackpropagationOutcome, BackpropagationSettings
from export.model.heads import HEAD
from export.model.load import load_model
from export.model.own_head import UnusableHead
from export.model.slices import slice_and_tensor
from export.slices.kinds import HELD, KINDS

RATE = 1e-3


def main() -> int:
    """Take the steps and write what they took."""
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=BackpropagationSettings)
    sys.stdout.buffer.write(msgspec.json.encode(train(settings)))
    return 0


def train(settings: BackpropagationSettings) -> BackpropagationOutcome:
    """AdamW steps on the slices and the head.

    Raises:
        ModelError: the folder is not what the package was made from.
        EdgeError: package or data cannot be used.
    """
    torch.set_num_threads(settings.threads)
    package = Package.open_known(Path(settings.package_folder), settings.package_sha256)
    manifest = package.manifest
    rows = load_rows(Path(settings.data_path), manifest.labels)
    ids = Tokenizer(package.path(manifest.tokenizer), settings.sequence).encode(rows)
    examples = Examples(ids, [row.label for row in rows], manifest.pad_token_id, settings.sequence)
    model = _model(settings, manifest)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    seconds = []
    for chosen in draw_batches(
        len(rows),
        seed=settings.seed,
        round_number=0,
        slot=0,
        steps=settings.steps,
        batch_size=settings.batch_size,
    ):
        started = time.perf_counter()
        batch = examples.batch(chosen.tolist())
        loss: Tensor = model(*map(torch.from_numpy, (batch.input_ids, batch.attention_mask, batch.labels)))[0]
        optimizer.zero_grad()
        loss.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return BackpropagationOutcome(status_bytes("VmHWM"), median(seconds[1:] or seconds))


def _model(settings: BackpropagationSettings, manifest: Manifest) -> nn.Module:
    """The model with the package's kind of slices, of which only those that the task trains have a gradient."""
    specs = {spec.name: spec for spec in manifest.slices if spec.kind != HEAD}
    first = next(iter(specs.values()), None)
    if first is None:
        raise ModelError(f"package {manifest.name} has no slices beside the head")
    kind = KINDS[first.kind].options_of({tensor.name: tensor.shape for tensor in first.tensors})
    options = replace(kind, targets=tuple(specs))
    features = manifest.head_features if manifest.head is not None else None
    folder = Path(settings.model)
    try:
        model = load_model(
            folder,
            len(manifest.labels),
            options,
            manifest.task,
            features=features,
            mlp_topk=None if manifest.mlp_topk is msgspec.UNSET else manifest.mlp_topk.kept,
        ).materialise()
    except UnusableHead as error:
        raise ModelError(
            f"{folder} has not the classifier that the package went on from: {error}; name the folder it was exported "
            "from, or if an adapter brought the classifier, one that edge-export merge wrote"
        ) from error
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(f"{HEAD}."):
            owner, tensor = slice_and_tensor(name)
            parameter.requires_grad_(owner in settings.slices and tensor not in HELD)
    return model.train()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
