"""One worker that stays and answers requests, seen from the process that asks. It loads neither numpy nor an engine."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType

import msgspec

from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import WorkerError
from edge_runtime.inference.requests import (
    Classified,
    ClassifyText,
    Finished,
    GenerateText,
    Piece,
    StopGenerating,
)
from edge_runtime.memory.sampler import Sampler
from edge_runtime.worker.inference_jobs import Answer, InferenceJob, Ready, Request, RequestFailed
from edge_runtime.worker.jobs import PhaseEntered, rebuild_error
from edge_runtime.worker.process import RunningWorker, launch_worker, look, look_interval_s, why_ended

INFERENCE_COMMAND = (sys.executable, "-m", "edge_runtime.worker.inference")
#: Longest answer line: the probabilities of 100,000 labels of 2,000 characters would be longer, and no model has them.
MAX_ANSWER_BYTES = 32 << 20
#: Time in which a worker must have loaded its model, and in which it must answer with a label or a further token.
LOAD_TIMEOUT_S, ANSWER_TIMEOUT_S = 600.0, 600.0
#: Time that a worker which was told to end may take, before it is killed.
CLOSE_TIMEOUT_S = 2.0
_READ_BYTES = 1 << 16


class InferenceSession:
    """A worker with its model loaded. One request at a time: whoever shares a session must see to that.

    Attributes:
        ready: what the worker said once it was ready.
    """

    ready: Ready

    def __init__(self, worker: RunningWorker) -> None:
        self._worker = worker
        self._sampler = Sampler()
        self._unread = bytearray()
        self._last = b""
        self._busy = False

    @classmethod
    def start(
        cls,
        job: InferenceJob,
        launch: Callable[[int], RunningWorker] = lambda cap_bytes: launch_worker(
            cap_bytes, INFERENCE_COMMAND
        ),
    ) -> InferenceSession:
        """Start a worker, held to the job's cap, and wait until its model is loaded.

        Args:
            job: what to load.
            launch: function that starts a worker's program under a cap.

        Raises:
            EdgeError: the model cannot be loaded; class and message are the worker's.
        """
        session = cls(launch(job.cap_bytes))
        try:
            session._send(msgspec.json.encode(job))
            session.ready = session._is_ready()
        except BaseException:
            session.close()
            raise
        return session

    @property
    def alive(self) -> bool:
        """Whether the worker still runs."""
        return self._worker.process.poll() is None

    @property
    def busy(self) -> bool:
        """Whether a request has not been answered to its end."""
        return self._busy

    @property
    def peak_bytes(self) -> int | None:
        """The kernel's largest charge to the worker's control group; None without one."""
        return self._worker.memory_limit.peak_bytes()

    @property
    def enforced_by(self) -> str:
        """Means that holds the worker to its cap."""
        return self._worker.memory_limit.enforced_by

    def classify(self, text: str) -> Classified:
        """The label of a text.

        Raises:
            EdgeError: the text cannot be used; or the worker ended, and with it the session.
        """
        for answer in self._ask(ClassifyText(text)):
            if isinstance(answer, Classified):
                return answer
        raise WorkerError("the worker did not answer with a label")

    def generate(self, request: GenerateText) -> Iterator[Piece | Finished]:
        """The pieces of a generated text, and its end. Where the iterator is closed early, generating stops.

        Raises:
            EdgeError: the text cannot be used; or the worker ended, and with it the session.
        """
        ended = False
        answers = self._ask(request)
        try:
            for answer in answers:
                ended = isinstance(answer, Finished)
                if isinstance(answer, Piece | Finished):
                    yield answer
        finally:
            if not ended and self._busy and self.alive:
                self._send(msgspec.json.encode(StopGenerating()))
                for _ in answers:
                    pass

    def close(self) -> None:
        """End the worker. More calls do nothing."""
        stdin = self._worker.process.stdin
        if stdin is not None:
            with suppress(OSError):
                stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._worker.process.wait(0 if self._busy else CLOSE_TIMEOUT_S)
        self._worker.close()

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_ready(self) -> Ready:
        answer = self._next(LOAD_TIMEOUT_S)
        if not isinstance(answer, Ready):
            raise WorkerError("the worker answered before it was asked")
        return answer

    def _ask(self, request: Request) -> Iterator[Answer]:
        """The answers to a request, the last one included."""
        self._busy = True
        self._send(msgspec.json.encode(request))
        while True:
            answer = self._next(ANSWER_TIMEOUT_S)
            if isinstance(answer, RequestFailed):
                self._busy = False
                raise rebuild_error(answer.failure)
            if isinstance(answer, Classified | Finished):
                self._busy = False
                yield answer
                return
            yield answer

    def _send(self, data: bytes) -> None:
        """Hand over a line. If the worker no longer listens, reading tells how it ended."""
        stdin = self._worker.process.stdin
        if stdin is None:
            raise WorkerError("the worker has no standard input")
        with suppress(BrokenPipeError):
            stdin.write(data + b"\n")
            stdin.flush()

    def _next(self, timeout_s: float) -> Answer:
        """The worker's next answer; phases are noted, and lines that a library printed are passed over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            line = self._line(deadline_s)
            if line is None:
                self._worker.process.wait()
                self._busy = False
                raise why_ended(self._worker, self._sampler, self._last)
            try:
                answer: Answer = msgspec.json.decode(line, type=Answer)
            except MALFORMED:
                self._last = line or self._last
                continue
            if isinstance(answer, PhaseEntered):
                self._sampler.phase = answer.phase
                look(self._worker, self._sampler)
                continue
            return answer

    def _line(self, deadline_s: float) -> bytes | None:
        """The next line that the worker writes, its memory looked at meanwhile; None at the end."""
        stdout = self._worker.process.stdout
        if stdout is None:
            raise WorkerError("the worker has no standard output")
        interval_s, searched = look_interval_s(self._worker), 0
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while (end := self._unread.find(b"\n", searched)) < 0:
                searched = len(self._unread)
                now_s = time.monotonic()
                if now_s >= deadline_s or searched > MAX_ANSWER_BYTES:
                    self._worker.kill()
                    raise WorkerError(
                        f"the worker gave no answer of less than {MAX_ANSWER_BYTES} bytes in time and was stopped"
                    )
                if not selector.select(min(interval_s, deadline_s - now_s)):
                    look(self._worker, self._sampler)
                    continue
                data = os.read(stdout.fileno(), _READ_BYTES)
                if not data:
                    self._last = bytes(self._unread) or self._last
                    return None
                self._unread += data
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        return line
