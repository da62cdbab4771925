"""How much memory a task will take, from the manifest alone; and the largest micro-batch that fits a cap.

The prediction has five parts (DESIGN section 4): the floor (interpreter and libraries, measured on the device
or taken from the constant below), weights as the engine holds them, the largest live set of any program, the
values that wait between segments, and slices. It uses no engine and no numpy, so agent and coordinator can
call it.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.package import Manifest, Program, Segment, SizeTerm, TensorRef

#: Resident size of a worker that has loaded its libraries and done nothing, measured on x86-64 with
#: CPython 3.11, numpy 2.4, onnxruntime 1.31; devices report their own figure at check-in.
DEFAULT_FLOOR_BYTES = 72 << 20
#: A session's own structures beside its weights: graph, kernels, a small arena. Measured, see docs/decisions.
SESSION_BYTES = 1 << 20
FLOAT_BYTES = 4
_ITEM_BYTES = {"float32": 4, "uint8": 1, "int64": 8, "int32": 4, "bool": 1}


@dataclass(frozen=True)
class PeakPrediction:
    """Predicted peak of a worker by part, in bytes."""

    floor_bytes: int
    weights_bytes: int
    live_bytes: int
    waiting_bytes: int
    slices_bytes: int

    @property
    def total_bytes(self) -> int:
        """The predicted peak."""
        return (
            self.floor_bytes + self.weights_bytes + self.live_bytes + self.waiting_bytes + self.slices_bytes
        )


def predict_peak(
    manifest: Manifest,
    *,
    first_segment: int | None,
    batch_size: int,
    micro_batch: int,
    sequence: int,
    draws: int,
    floor_bytes: int = 0,
) -> PeakPrediction:
    """Predict the peak resident memory of a worker.

    Args:
        manifest: of the package.
        first_segment: first segment that carries tangents; None for evaluation or head-only training.
        batch_size: examples of a step. micro_batch: examples run at a time.
        sequence: tokens of the longest example. draws: tangents per example.
        floor_bytes: measured on the device; 0 takes the constant of this module.
    """
    live, weights = 0.0, 0
    for index, segment in enumerate(manifest.segments):
        program = manifest.programs[program_name(segment, index, first_segment)]
        live = max(live, live_bytes(program, micro_batch, sequence, draws))
        weights += SESSION_BYTES + sum(_held_bytes(tensor) for tensor in segment.weights.values())
    rows = 1 + (draws if first_segment is not None else 0)
    hidden = batch_size * sequence * manifest.base.hidden_size * FLOAT_BYTES * rows
    masks = batch_size * sequence * sequence * FLOAT_BYTES
    trained = sum(spec.dimensions for spec in manifest.slices) * FLOAT_BYTES
    return PeakPrediction(
        floor_bytes=floor_bytes or DEFAULT_FLOOR_BYTES,
        weights_bytes=weights,
        live_bytes=int(live),
        waiting_bytes=hidden + masks,
        slices_bytes=SLICE_COPIES * trained,
    )


#: Values, their change, one gradient, and the encoded blobs in and out.
SLICE_COPIES = 5


def program_name(segment: Segment, index: int, first_segment: int | None) -> str:
    """Which of a segment's programs runs, as :class:`edge_runtime.executor.Executor` chooses it."""
    if first_segment is None or index < first_segment:
        return segment.primal
    chosen = segment.entry if index == first_segment else segment.dual
    return chosen or segment.primal


def live_bytes(program: Program, batch: int, sequence: int, draws: int) -> float:
    """Largest live set of a program at a size: the largest of its polynomials."""
    return max(
        (sum(_term(term, batch, sequence, draws) for term in candidate) for candidate in program.live),
        default=0.0,
    )


def largest_micro_batch(
    manifest: Manifest,
    cap_bytes: int,
    *,
    first_segment: int | None,
    batch_size: int,
    sequence: int,
    draws: int,
    floor_bytes: int = 0,
) -> tuple[int, PeakPrediction]:
    """The largest micro-batch whose predicted peak fits the cap, by halving from the whole batch.

    Returns:
        The micro-batch and its prediction. If even one example at a time does not fit, the micro-batch is
        1 and the prediction exceeds the cap: the caller refuses, with both figures.
    """
    micro_batch = batch_size
    while True:
        prediction = predict_peak(
            manifest,
            first_segment=first_segment,
            batch_size=batch_size,
            micro_batch=micro_batch,
            sequence=sequence,
            draws=draws,
            floor_bytes=floor_bytes,
        )
        if prediction.total_bytes <= cap_bytes or micro_batch == 1:
            return micro_batch, prediction
        micro_batch = -(-micro_batch // 2)


def _term(term: SizeTerm, batch: int, sequence: int, draws: int) -> float:
    scale = batch**term.batch_power * sequence**term.sequence_power * draws**term.draws_power
    return float(term.coefficient * scale)


def _held_bytes(tensor: TensorRef) -> int:
    total = _ITEM_BYTES[tensor.dtype]
    for side in tensor.shape:
        total *= side
    return total
