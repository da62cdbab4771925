"""The worker process that uses a model (see :mod:`edge_runtime.worker.inference_jobs`).

:func:`open_model` loads package, values and programs under a plan that fits the cap, :func:`answer` answers a request.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_runtime.data.batches import Tokenizer
from edge_runtime.data.rows import Row
from edge_runtime.decoding import MALFORMED
from edge_runtime.engines.choice import engine_maker
from edge_runtime.errors import CapExceededError, ConfigError, EdgeError, WorkerError
from edge_runtime.execution.decoder import Decoder
from edge_runtime.execution.executor import Executor
from edge_runtime.inference.classify import classify
from edge_runtime.inference.generate import generate
from edge_runtime.inference.requests import Classified, ClassifyText, GenerateText, StopGenerating
from edge_runtime.memory.allocator import keep_freed_memory, release_library_code, return_freed_memory
from edge_runtime.memory.enforcement import ran_out_of_memory
from edge_runtime.memory.meter import Meter
from edge_runtime.memory.plan import Plan, Planner, Work
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values, decode_values
from edge_runtime.protocol.messages import Blocks
from edge_runtime.worker.ending import end_of, write_line
from edge_runtime.worker.inference_jobs import (
    MAX_REQUEST_BYTES,
    Answer,
    InferenceJob,
    Ready,
    Request,
    RequestFailed,
)
from edge_runtime.worker.jobs import PhaseEntered, describe_failure

_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready for requests.

    Attributes:
        manifest: the package's manifest.
        tokenizer: the package's tokenizer.
        executor: its primal programs for classification, its decode programs for generation.
        values: values of all slices.
        plan: the plan that was chosen.
        sequence_limit: largest number of tokens of a text.
        exits: blocks behind which texts may leave the model, those that fit the cap; empty for none.
        confidence: least probability of a label at which a text leaves before the last of them.
    """

    manifest: Manifest
    tokenizer: Tokenizer
    executor: Executor
    values: Values
    plan: Plan
    sequence_limit: int
    exits: Blocks = ()
    confidence: float = 1.0


def inference_work(manifest: Manifest, sequence_limit: int) -> Work:
    """Size of one request's work, for which a plan is chosen."""
    return Work(1, sequence_limit, 0, (), keeps_tokenizer=True, generates=manifest.task == "causal_lm")


def open_model(job: InferenceJob, meter: Meter) -> OpenModel:
    """Load what a job names.

    Raises:
        CapExceededError: no plan fits the cap; has both figures.
        EdgeError: package or values cannot be used.
    """
    engine = engine_maker(job.engine)(job.threads)
    meter.enter("load")
    package = Package.open_known(Path(job.package_folder), job.package_sha256).for_engine(job.engine)
    prepared = PreparedPackage.open(package, Path(job.prepared_folder), engine.version)
    whole, exits = prepared, job.exits
    prepared = whole.with_head(job.features, job.pooling)
    manifest = prepared.manifest
    try:
        values = decode_values(Path(job.state_path).read_bytes(), manifest.slices)
    except OSError as error:
        raise ConfigError(f"cannot read the slice values {job.state_path}: {error.strerror}") from error
    generates = manifest.task == "causal_lm"
    limit = min(job.sequence_limit or manifest.sequence_limit, manifest.sequence_limit)
    stored = prepared.prepared
    while True:
        planner = Planner(manifest, stored.arithmetic, meter.floor_bytes, stored.calibration)
        try:
            plan = planner.choose(inference_work(manifest, limit), job.cap_bytes)
            break
        except CapExceededError:
            if len(exits) < 2:
                raise
            exits = exits[:-1]  # a shallower model may fit
            prepared = whole.with_head(exits[-1:], job.pooling)
            manifest = prepared.manifest
    release_library_code()  # imports have run
    tokenizer = Tokenizer(package.path(manifest.tokenizer), limit)
    return_freed_memory()
    weights = plan.choice.weights
    executor = Decoder(prepared, engine, weights) if generates else Executor(prepared, engine, (), weights)
    release_library_code()
    return OpenModel(manifest, tokenizer, executor, values, plan, limit, exits, job.confidence)


def answer(model: OpenModel, request: Request, told_to_stop: Callable[[], bool]) -> Iterator[Answer]:
    """The answers to one request.

    Raises:
        EdgeError: the text cannot be used, or the package cannot do what is asked.
    """
    if isinstance(request, ClassifyText):
        if isinstance(model.executor, Decoder):
            raise ConfigError(f"package {model.manifest.name} generates text; it has no labels")
        (ids,) = model.tokenizer.encode([Row(request.text)])
        label, probabilities, depth = classify(
            model.executor, model.values, ids, model.sequence_limit, model.exits, model.confidence
        )
        yield Classified(label, probabilities, len(ids), depth)
    elif isinstance(request, GenerateText):
        if not isinstance(model.executor, Decoder):
            raise ConfigError(f"package {model.manifest.name} classifies; it generates no text")
        limit = model.sequence_limit
        yield from generate(model.executor, model.tokenizer, model.values, request, limit, told_to_stop)


def serve(job: InferenceJob, requests: RequestLines) -> None:
    """Load the model, say so, and answer requests until standard input ends."""
    keep_freed_memory()
    engine_maker(job.engine)  # its library is part of the floor
    meter = Meter(lambda phase: write_line(PhaseEntered(phase)))
    model = open_model(job, meter)
    meter.enter("answer")
    plan = model.plan
    write_line(
        Ready(
            model.executor.arithmetic,
            plan.choice.weights,
            plan.peak.total_bytes,
            model.sequence_limit,
            meter.peak_bytes,
        )
    )
    while (request := requests.next()) is not None:
        try:
            for part in answer(model, request, requests.stop_waits):
                write_line(part)
        except Exception as error:
            if ran_out_of_memory(error) or not isinstance(error, EdgeError):
                raise
            write_line(RequestFailed(describe_failure(error)))


class RequestLines:
    """Lines of a file descriptor, parsed.

    Args:
        descriptor: the file descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = bytearray()

    def line(self) -> bytes | None:
        """The next line without its end, waited for; None at the end.

        Raises:
            WorkerError: it has more than ``MAX_REQUEST_BYTES``.
        """
        searched = 0
        while (end := self._unread.find(b"\n", searched)) < 0:
            searched = len(self._unread)
            if searched > MAX_REQUEST_BYTES:
                raise WorkerError(f"a request has more than {MAX_REQUEST_BYTES} bytes")
            data = os.read(self._descriptor, _READ_BYTES)
            if not data:
                return None
            self._unread += data
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        return line

    def next(self) -> Request | None:
        """The next request, waited for; None at the end.

        Raises:
            WorkerError: it is malformed.
        """
        line = self.line()
        try:
            return None if line is None else msgspec.json.decode(line, type=Request)
        except MALFORMED as error:
            raise WorkerError(f"malformed request: {error}") from error

    def stop_waits(self) -> bool:
        """Whether the next line is there and asks to stop; it is then taken. So does the end of the input."""
        if not self._unread and not select.select([self._descriptor], [], [], 0)[0]:
            return False
        request = self.next()
        if request is None or isinstance(request, StopGenerating):
            return True
        raise WorkerError("a request came before the last one was answered")


def main() -> int:
    """Read a job and requests from standard input; write answers to standard output."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    requests = RequestLines(sys.stdin.fileno())
    return end_of(lambda: serve(_read_job(requests), requests))


def _read_job(requests: RequestLines) -> InferenceJob:
    try:
        return msgspec.json.decode(requests.line() or b"", type=InferenceJob)
    except MALFORMED as error:
        raise WorkerError(f"malformed job: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
