"""How much memory a task will take, from the manifest alone; and the largest micro-batch that fits a cap.

The prediction has these parts: the floor (interpreter, libraries, engine), the tokenizer, weights as the
engine holds them, the largest live set of any program, values that wait between segments, and slices. It
uses no engine and no numpy, so agent and coordinator can call it.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.package import Manifest, Program, Segment, SizeTerm, TensorRef

#: Resident size of a worker that has imported its libraries and done nothing; a device that has run a task
#: reports its own figure. This and the constants below were measured on x86-64 with CPython 3.11, numpy 2.4,
#: onnxruntime 1.31 and tokenizers 0.23 (docs/decisions/0006-memory-prediction.md).
DEFAULT_FLOOR_BYTES = 64 << 20
#: What the engine sets up with its first session: operator registries and the code pages they touch.
ENGINE_BYTES = 17 << 20
#: A loaded tokenizer over the size of its file.
TOKENIZER_FACTOR = 26
#: A session's matrices over their stored size: the engine packs them once for each operator that uses them.
PACKED_FACTOR = 1.5
#: Tensors as the C library's heap holds them, over their sum: gaps between reused blocks, and operators'
#: own working memory.
HEAP_FACTOR = 1.8
#: A row of an embedding touches a page of levels and a page of scales.
EMBEDDING_PAGES_BYTES = 2 * 4096
#: Values, their change, one gradient, and the encoded blobs in and out.
SLICE_COPIES = 5
FLOAT_BYTES = 4
#: Tokens of a group: more take memory and save no time, fewer leave the engine's kernels short of rows
#: (docs/decisions/0003-engine.md).
PREFERRED_TOKENS = 256
_ITEM_BYTES = {"float32": 4, "uint8": 1, "int64": 8, "int32": 4, "bool": 1}


@dataclass(frozen=True)
class PeakPrediction:
    """Predicted peak of a worker by part, in bytes."""

    floor_bytes: int
    tokenizer_bytes: int
    weights_bytes: int
    live_bytes: int
    waiting_bytes: int
    slices_bytes: int

    @property
    def total_bytes(self) -> int:
        """The predicted peak."""
        return sum(getattr(self, field) for field in self.__dataclass_fields__)


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
    live = 0.0
    for index, segment in enumerate(manifest.segments):
        program = manifest.programs[program_name(segment, index, first_segment)]
        live = max(live, live_bytes(program, micro_batch, sequence, draws))
    embedding, *blocks = (sum(map(_stored_bytes, segment.weights.values())) for segment in manifest.segments)
    touched = min(embedding, batch_size * sequence * EMBEDDING_PAGES_BYTES)
    tokenizer = manifest.files[manifest.tokenizer].bytes * TOKENIZER_FACTOR
    rows = 1 + (draws if first_segment is not None else 0)
    hidden = batch_size * sequence * manifest.base.hidden_size * FLOAT_BYTES * rows
    masks = batch_size * sequence * sequence * FLOAT_BYTES
    trained = sum(spec.dimensions for spec in manifest.slices) * FLOAT_BYTES
    return PeakPrediction(
        floor_bytes=(floor_bytes or DEFAULT_FLOOR_BYTES) + ENGINE_BYTES,
        tokenizer_bytes=tokenizer,
        weights_bytes=int(sum(blocks) * PACKED_FACTOR) + touched,
        live_bytes=int(live * HEAP_FACTOR),
        waiting_bytes=hidden + masks,
        slices_bytes=SLICE_COPIES * trained,
    )


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
    """The largest micro-batch whose predicted peak fits the cap, by halving from the preferred one.

    Returns:
        The micro-batch and its prediction. If even one example at a time does not fit, the micro-batch is
        1 and the prediction exceeds the cap: the caller refuses, with both figures.
    """
    micro_batch = preferred_micro_batch(batch_size, sequence)
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


def preferred_micro_batch(batch_size: int, sequence: int) -> int:
    """Examples to run at a time where memory does not matter: about ``PREFERRED_TOKENS`` tokens."""
    return min(batch_size, max(1, PREFERRED_TOKENS // sequence))


def _term(term: SizeTerm, batch: int, sequence: int, draws: int) -> float:
    scale = batch**term.batch_power * sequence**term.sequence_power * draws**term.draws_power
    return float(term.coefficient * scale)


def _stored_bytes(tensor: TensorRef) -> int:
    total = _ITEM_BYTES[tensor.dtype]
    for side in tensor.shape:
        total *= side
    return total
