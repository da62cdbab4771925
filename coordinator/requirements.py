"""How much memory a task needs, by the package's own prediction: the one place that asks the planner."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.config import RunConfig
from edge_runtime.package import Manifest
from edge_runtime.plan import predict_peak


def required_bytes(manifest: Manifest, config: RunConfig, slices: Sequence[str], floor_bytes: int) -> int:
    """Predicted peak, in bytes, of a task that trains ``slices`` on a device with this floor (0: unknown)."""
    segments = [spec.segment for spec in manifest.slices if spec.name in slices]
    prediction = predict_peak(
        manifest,
        first_segment=min(segments, default=None),
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        sequence=min(config.sequence_limit, manifest.sequence_limit),
        draws=config.draws,
        floor_bytes=floor_bytes,
    )
    return int(prediction.total_bytes)
