"""What a device does in a round of masked contributions: four answers, each given once.

The protocol is that of Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning",
figure 4), between neighbours of a graph as in Bell et al. 2020 ("Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead"). A device's contribution leaves it with a mask of its own and one for each neighbour:

    y_u = x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv)   (mod 2^bits)

Those for neighbours cancel in the sum. Shares of b_u take u's own mask off if u contributed; shares of u's mask key
take off those for neighbours if it fell out after they had masked. Whoever had both could read x_u, so a device reveals
one of the two for each neighbour, once and for all: what it has answered is kept before it leaves, the same question
gets the same answer, and another question none.
"""

from __future__ import annotations

import secrets

from msgspec import Struct
from msgspec.structs import replace

from edge_runtime.errors import ProtocolError
from edge_runtime.masking.agreement import (
    check_keys,
    mask_seed,
    new_secret,
    public_half,
    seal,
    sign_keys,
    unseal,
)
from edge_runtime.masking.lanes import with_masks
from edge_runtime.masking.shamir import SHARE_BYTES, split
from edge_runtime.protocol.messages import (
    MaskingKeys,
    Peer,
    RevealedShare,
    RevealedShares,
    SealedShare,
    SealedShares,
    SendMasked,
    ShareSecrets,
    Task,
    Unmask,
)
from edge_runtime.protocol.signing import PrivateKey

#: Neighbours below which a sum would show a device too closely.
LEAST_PEERS = 2


class Participation(Struct, frozen=True):
    """How far a device is in a round. It is kept on the disk, for its owner alone, before an answer leaves.

    Attributes:
        task_id: name of the task.
        slot: slot of the device.
        bits: bits of the integers.
        mask_secret: private key of the masks for neighbours.
        share_secret: private key by which shares are sealed.
        own_mask: seed of the device's own mask.
        threshold: number of shares that give a secret back; 0 before the neighbours are known.
        peers: the neighbours.
        own_share: the device's share of its own mask.
        sealed: shares as they were sent.
        opened: slots of neighbours that shared, with the shares of their own mask and of their mask key.
        revealed: shares as they were revealed.
        asked: for which question they were.
    """

    task_id: str
    slot: int
    bits: int
    mask_secret: bytes
    share_secret: bytes
    own_mask: bytes
    threshold: int = 0
    peers: tuple[Peer, ...] = ()
    own_share: bytes = b""
    sealed: SealedShares | None = None
    opened: dict[int, tuple[bytes, bytes]] | None = None
    revealed: RevealedShares | None = None
    asked: Unmask | None = None


def take_part(task: Task, identity: PrivateKey) -> tuple[Participation, MaskingKeys]:
    """Begin: fresh secrets, and public keys for the others, signed."""
    bits = 0 if task.protection is None else task.protection.masked_bits
    part = Participation(task.task_id, task.slot, bits, new_secret(), new_secret(), secrets.token_bytes(32))
    keys = sign_keys(identity, task.task_id, public_half(part.mask_secret), public_half(part.share_secret))
    return part, keys


def share_secrets(part: Participation, stage: ShareSecrets) -> Participation:
    """Share both secrets among the neighbours; ``sealed`` of what comes back is to be sent.

    Raises:
        ProtocolError: there are too few neighbours, so few shares would do that two sets of them could answer
            differently, or they are others than those that were shared with before.
        SignatureError: a neighbour's keys are not signed by the key that it is said to have enrolled with.
    """
    if part.sealed is not None:
        if (stage.threshold, stage.peers) != (part.threshold, part.peers):
            raise ProtocolError(
                f"task {part.task_id} has shared its secrets with others; nothing is shared again"
            )
        return part
    slots = [peer.slot for peer in stage.peers]
    if len(set(slots) | {part.slot}) != len(slots) + 1 or len(slots) < LEAST_PEERS:
        raise ProtocolError(
            f"task {part.task_id} has {len(set(slots) - {part.slot})} neighbours, and a mask needs {LEAST_PEERS}"
        )
    holders = len(slots) + 1
    if not holders < 2 * stage.threshold <= 2 * holders:
        raise ProtocolError(
            f"task {part.task_id} is to be unmasked by {stage.threshold} of {holders} shares; more than half are "
            "needed, or two halves could be told different things"
        )
    for peer in stage.peers:
        check_keys(peer.identity, peer.task_id, peer.keys)
    places = [slot + 1 for slot in (part.slot, *slots)]
    of_mask = split(part.own_mask, places, stage.threshold)
    of_key = split(part.mask_secret, places, stage.threshold)
    sealed = tuple(
        SealedShare(
            peer.slot,
            seal(
                part.share_secret,
                peer.keys.share_key,
                part.slot,
                peer.slot,
                of_mask[peer.slot + 1] + of_key[peer.slot + 1],
            ),
        )
        for peer in stage.peers
    )
    return replace(
        part,
        threshold=stage.threshold,
        peers=stage.peers,
        own_share=of_mask[part.slot + 1],
        sealed=SealedShares(sealed),
    )


def open_shares(part: Participation, stage: SendMasked) -> Participation:
    """Take in what neighbours sealed; ``opened`` of what comes back names those that are masked against.

    Raises:
        ProtocolError: too few shared, something is not sealed for this device, or others shared before.
    """
    came = {share.slot: share.sealed for share in stage.shares}
    if part.opened is not None:
        if set(came) != set(part.opened):
            raise ProtocolError(f"task {part.task_id} was masked against others; it is not masked again")
        return part
    known = {peer.slot: peer for peer in part.peers}
    if len(came) != len(stage.shares) or not set(came) <= set(known):
        raise ProtocolError(f"task {part.task_id} got shares of devices that are none of its neighbours")
    if len(came) + 1 < part.threshold or len(came) < LEAST_PEERS:
        raise ProtocolError(
            f"{len(came)} neighbours of task {part.task_id} are left, fewer than could unmask it; it is not sent"
        )
    opened = {}
    for slot, sealed in came.items():
        data = unseal(part.share_secret, known[slot].keys.share_key, slot, part.slot, sealed)
        if len(data) != 2 * SHARE_BYTES:
            raise ProtocolError(
                f"slot {slot} sealed {len(data)} bytes, and two shares have {2 * SHARE_BYTES}"
            )
        opened[slot] = (data[:SHARE_BYTES], data[SHARE_BYTES:])
    return replace(part, opened=opened)


def masked(part: Participation, contribution: bytes) -> bytes:
    """The contribution with its masks: the same each time.

    Args:
        part: how far the device is, with ``opened``.
        contribution: little-endian integers of ``bits``.
    """
    keys = {peer.slot: peer.keys.mask_key for peer in part.peers}
    seeds = {
        slot: mask_seed(part.mask_secret, keys[slot], part.slot, slot) for slot in sorted(part.opened or {})
    }
    added = [part.own_mask, *(seed for slot, seed in seeds.items() if slot > part.slot)]
    return with_masks(
        contribution, part.bits, added, [seed for slot, seed in seeds.items() if slot < part.slot]
    )


def reveal(part: Participation, stage: Unmask) -> Participation:
    """Reveal one share of each neighbour; ``revealed`` of what comes back is to be sent.

    Raises:
        ProtocolError: the question is not of the neighbours that this device masked against, each once, and of itself;
            asks for what only too few contributed to; or differs from one that was answered.
    """
    if part.revealed is not None:
        if stage != part.asked:
            raise ProtocolError(
                f"task {part.task_id} has revealed shares for another outcome; both together could unmask a device"
            )
        return part
    opened = part.opened or {}
    asked = [*stage.contributed, *stage.fell_out]
    if sorted(asked) != sorted([part.slot, *opened]) or part.slot not in stage.contributed:
        raise ProtocolError(f"task {part.task_id} is asked for shares of others than it masked against")
    if len(stage.contributed) < max(part.threshold, LEAST_PEERS + 1):
        raise ProtocolError(
            f"only {len(stage.contributed)} contributed around task {part.task_id}, where {part.threshold} are needed; "
            "it reveals nothing"
        )
    shares = [
        *(
            RevealedShare(slot, part.own_share if slot == part.slot else opened[slot][0])
            for slot in stage.contributed
        ),
        *(RevealedShare(slot, opened[slot][1]) for slot in stage.fell_out),
    ]
    return replace(part, revealed=RevealedShares(tuple(shares)), asked=stage)
