"""A device's part in a round whose contributions are masked, across restarts: from its result to the unmasked sum.

::

    masking.part     secrets of the task, and what was answered (mode 0600)
    masking.vector   the contribution, as integers

What is answered is on the disk before it leaves, so that after a kill or a power cut the same question gets the same
answer (:mod:`edge_runtime.masking.participant` says why that matters).
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_runtime.agent.client import Client
from edge_runtime.decoding import MALFORMED
from edge_runtime.durable import sync_folder, write_durably
from edge_runtime.errors import ProtocolError, RefusedError, SignatureError
from edge_runtime.log import note, warn
from edge_runtime.masking.participant import (
    Participation,
    masked,
    open_shares,
    reveal,
    share_secrets,
    take_part,
)
from edge_runtime.protocol.messages import (
    MaskingKeys,
    MaskingOver,
    MaskingStage,
    MaskingWait,
    RevealedShares,
    SealedShares,
    SendMasked,
    ShareSecrets,
    Task,
)
from edge_runtime.protocol.signing import PrivateKey

PART, VECTOR = "masking.part", "masking.vector"
#: Longest wait that is obeyed between two questions.
LONGEST_WAIT_S = 60.0
#: Refusals after which the stage is asked for again: the round went on meanwhile.
ROUND_WENT_ON = "stale"
#: Refusals of a question after which nothing more is to be done for the task.
TASK_IS_GONE = frozenset({"unknown_task", "not_your_task", "unknown_path"})


class MaskedRound:
    """The masked contribution that waits for its round, if there is one.

    Args:
        folder: state folder of the device.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, task: Task, identity: PrivateKey, contribution: bytes) -> MaskingKeys:
        """Keep a contribution until its round asks for it; the keys to hand in as the task's result."""
        part, keys = take_part(task, identity)
        write_durably(self._folder / VECTOR, contribution, mode=0o600)
        self._keep(part)
        return keys

    def go_on(self, client: Client) -> float | None:
        """Answer what the round asks.

        Returns:
            Seconds to wait before the next question; None if no contribution waits any more.

        Raises:
            CoordinatorError: the coordinator cannot be reached, or refuses this device.
        """
        while (part := self._part()) is not None:
            try:
                stage = client.masking_stage(part.task_id)
            except RefusedError as error:
                if error.code not in TASK_IS_GONE:
                    raise
                self._end(part, str(error))
                return None
            if isinstance(stage, MaskingWait):
                return min(stage.again_s, LONGEST_WAIT_S)
            if isinstance(stage, MaskingOver):
                self._end(part, stage.reason)
                return None
            try:
                what, body = self._answer(part, stage)
                client.put_masking(part.task_id, what, body)
                note("masking_answered", task_id=part.task_id, stage=what)
            except (ProtocolError, SignatureError) as error:
                warn("masking_not_answered", task_id=part.task_id, error=error)
                self._drop()
            except RefusedError as error:
                if error.code != ROUND_WENT_ON:
                    raise
        return None

    def _answer(
        self, part: Participation, stage: MaskingStage
    ) -> tuple[str, bytes | SealedShares | RevealedShares]:
        """The answer to a stage, kept before it is given."""
        if isinstance(stage, ShareSecrets):
            part = share_secrets(part, stage)
            self._keep(part)
            return "shares", part.sealed or SealedShares(())
        if isinstance(stage, SendMasked):
            part = open_shares(part, stage)
            self._keep(part)
            return "vector", masked(part, (self._folder / VECTOR).read_bytes())
        if isinstance(stage, MaskingWait | MaskingOver):
            raise ProtocolError("nothing is asked")
        part = reveal(part, stage)
        self._keep(part)
        return "reveal", part.revealed or RevealedShares(())

    def _part(self) -> Participation | None:
        path = self._folder / PART
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=Participation)
        except FileNotFoundError:
            return None
        except MALFORMED as error:
            warn("masking_unreadable", path=path, error=error)
            self._drop()
            return None

    def _keep(self, part: Participation) -> None:
        write_durably(self._folder / PART, msgspec.msgpack.encode(part), mode=0o600)

    def _end(self, part: Participation, reason: str) -> None:
        note("masking_over", task_id=part.task_id, reason=reason)
        self._drop()

    def _drop(self) -> None:
        (self._folder / PART).unlink(missing_ok=True)
        (self._folder / VECTOR).unlink(missing_ok=True)
        sync_folder(self._folder)
