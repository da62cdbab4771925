"""A device's four answers: the same when asked again, and none that would unmask it."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.aggregation.masked_sum import neighbours, threshold_of, unmasked_sum
from edge_runtime.errors import ProtocolError, SignatureError
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
    Peer,
    Protection,
    SealedShare,
    SendMasked,
    ShareSecrets,
    Unmask,
)
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.golden.generate import TASK

COUNT = 50


class Round:
    """A round of so many devices in one process, with the coordinator's part played by hand."""

    def __init__(self, devices: int, bits: int = 32) -> None:
        self.bits = bits
        self.parts: dict[int, Participation] = {}
        self.keys: dict[int, MaskingKeys] = {}
        self.identities: dict[int, str] = {}
        protection = Protection(None, 0.0, bits, 1.0, 1000)  # type: ignore[arg-type]
        for slot in range(devices):
            identity = generate_key()
            task = replace(TASK, task_id=f"t-{slot}", slot=slot, protection=protection)
            self.parts[slot], self.keys[slot] = take_part(task, identity)
            self.identities[slot] = identity.public_key
        self.near = neighbours(list(self.parts), "label")
        self.threshold = {slot: threshold_of(len(near)) for slot, near in self.near.items()}
        generator = np.random.default_rng(devices)
        self.numbers = generator.integers(-1000, 1001, (devices, COUNT)).astype(f"<i{bits // 8}")

    def question(self, slot: int) -> ShareSecrets:
        peers = [Peer(o, f"t-{o}", self.identities[o], self.keys[o]) for o in self.near[slot]]
        return ShareSecrets(self.threshold[slot], tuple(peers))

    def share(self, slots: list[int]) -> None:
        for slot in slots:
            self.parts[slot] = share_secrets(self.parts[slot], self.question(slot))

    def sealed_for(self, slot: int, shared: list[int]) -> SendMasked:
        came = []
        for other in self.near[slot]:
            if other in shared:
                sent = self.parts[other].sealed
                assert sent is not None
                came += [SealedShare(other, each.sealed) for each in sent.shares if each.slot == slot]
        return SendMasked(tuple(came))

    def mask(self, slots: list[int], shared: list[int]) -> dict[int, bytes]:
        for slot in slots:
            self.parts[slot] = open_shares(self.parts[slot], self.sealed_for(slot, shared))
        return {slot: masked(self.parts[slot], self.numbers[slot].tobytes()) for slot in slots}

    def asked(self, slot: int, contributed: list[int]) -> Unmask:
        against = list(self.parts[slot].opened or {})
        return Unmask(
            tuple(sorted([slot, *(o for o in against if o in contributed)])),
            tuple(sorted(o for o in against if o not in contributed)),
        )

    def total(self, shared: list[int], vectors: dict[int, bytes], revealing: list[int]) -> np.ndarray:
        revealed: dict[int, dict[int, bytes]] = {}
        for slot in revealing:
            self.parts[slot] = reveal(self.parts[slot], self.asked(slot, list(vectors)))
            shares = self.parts[slot].revealed
            assert shares is not None
            for share in shares.shares:
                revealed.setdefault(share.slot, {})[slot + 1] = share.share
        return unmasked_sum(
            vectors.items(),
            bits=self.bits,
            count=COUNT,
            contributed=vectors,
            masked_against={slot: [o for o in self.near[slot] if o in shared] for slot in shared},
            mask_keys={slot: keys.mask_key for slot, keys in self.keys.items()},
            thresholds=self.threshold,
            revealed=revealed,
        )


@pytest.mark.parametrize(("devices", "bits", "fall"), [(3, 32, 0), (10, 32, 1), (10, 64, 1), (60, 32, 3)])
def test_the_sum_is_the_plain_one_whoever_falls_out(devices: int, bits: int, fall: int) -> None:
    """Devices fall out before they share, contribute and reveal; the sum is that of those that contributed."""
    played = Round(devices, bits)
    everyone = list(range(devices))
    shared = everyone[fall:]
    contributing = shared[fall:]
    revealing = contributing[fall:]
    played.share(shared)
    vectors = played.mask(contributing, shared)
    total = played.total(shared, vectors, revealing)
    assert (total == played.numbers[contributing].astype(np.int64).sum(axis=0)).all()


def test_masked_numbers_look_like_none_of_the_contribution() -> None:
    """A masked vector has next to no number of the contribution, and correlates with nothing of it."""
    played = Round(5)
    everyone = list(range(5))
    played.share(everyone)
    vectors = played.mask(everyone, everyone)
    sent = np.frombuffer(vectors[2], "<i4")
    assert (sent == played.numbers[2]).sum() == 0
    assert np.abs(sent).max() > 2**28


def test_too_few_shares_unmask_nothing() -> None:
    """With fewer revealed shares than the threshold there is no sum, and the message has both numbers."""
    played = Round(10)
    everyone = list(range(10))
    played.share(everyone)
    vectors = played.mask(everyone, everyone)
    with pytest.raises(ProtocolError, match="5 of 6 shares"):
        played.total(everyone, vectors, everyone[:5])


def test_the_same_question_gets_the_same_answer() -> None:
    """After a restart from what was kept, each answer is the same to the byte."""
    played = Round(4)
    everyone = list(range(4))
    played.share(everyone)
    kept = played.parts[1]
    assert share_secrets(kept, played.question(1)) == kept
    first = played.mask(everyone, everyone)
    assert played.mask(everyone, everyone) == first
    asked = played.asked(1, everyone)
    once = reveal(played.parts[1], asked)
    assert reveal(once, asked) == once


def test_a_second_outcome_is_never_answered() -> None:
    """A device that revealed shares of own masks reveals none of mask keys afterwards, nor the other way round."""
    played = Round(5)
    everyone = list(range(5))
    played.share(everyone)
    played.mask(everyone, everyone)
    for first, second in ((everyone, everyone[:4]), (everyone[:4], everyone)):
        answered = reveal(played.parts[0], played.asked(0, first))
        with pytest.raises(ProtocolError, match="both together could unmask a device"):
            reveal(answered, played.asked(0, second))


def test_questions_that_would_unmask_are_refused() -> None:
    """Neither both secrets of one device, nor fewer than were masked against, nor too few that contributed."""
    played = Round(5)
    everyone = list(range(5))
    played.share(everyone)
    played.mask(everyone, everyone)
    part = played.parts[0]
    for question in (
        Unmask((0, 1, 2, 3, 4), (4,)),
        Unmask((0, 1, 2, 3), ()),
        Unmask((1, 2, 3, 4), (0,)),
        Unmask((0, 1, 2, 3, 4, 9), ()),
        Unmask((0, 1), (2, 3, 4)),
    ):
        with pytest.raises(ProtocolError):
            reveal(part, question)


def test_who_takes_part_cannot_be_changed_or_made_up() -> None:
    """Another roster, too low a threshold, too few or forged neighbours are refused before a share leaves."""
    played = Round(6)
    question = played.question(0)
    fresh = played.parts[0]
    shared = share_secrets(fresh, question)
    with pytest.raises(ProtocolError, match="nothing is shared again"):
        share_secrets(shared, replace(question, peers=question.peers[:4]))
    with pytest.raises(ProtocolError, match="more than half"):
        share_secrets(fresh, replace(question, threshold=3))
    with pytest.raises(ProtocolError, match="more than half"):
        share_secrets(fresh, replace(question, threshold=7))
    with pytest.raises(ProtocolError, match="neighbours"):
        share_secrets(fresh, replace(question, peers=question.peers[:1]))
    with pytest.raises(ProtocolError, match="neighbours"):
        share_secrets(fresh, replace(question, peers=(question.peers[0],) * 5))
    forged = replace(question.peers[0], identity=generate_key().public_key)
    with pytest.raises(SignatureError):
        share_secrets(fresh, replace(question, peers=(forged, *question.peers[1:])))


def test_masks_are_made_once_against_the_same_devices() -> None:
    """A device that masked against some does not mask against others, nor against too few."""
    played = Round(6)
    everyone = list(range(6))
    played.share(everyone)
    part = open_shares(played.parts[0], played.sealed_for(0, everyone))
    with pytest.raises(ProtocolError, match="not masked again"):
        open_shares(part, played.sealed_for(0, everyone[:5]))
    with pytest.raises(ProtocolError, match="fewer than could unmask"):
        open_shares(played.parts[0], played.sealed_for(0, [1, 2]))
    wrong = played.sealed_for(1, everyone).shares
    with pytest.raises(ProtocolError):
        open_shares(played.parts[0], SendMasked(wrong))
