"""Wire messages between device and coordinator: one frozen msgspec Struct each.

Rules of evolution: new fields go last and have a default; a field is never renamed or given another meaning; recorded
bytes of every released version must decode forever (tests/edge_runtime/golden). Control messages travel as JSON,
results as MessagePack because they carry tensors. Sizes and counts are bounded here, so that whatever decodes can be
used without checking ranges again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import ProtocolError

PROTOCOL_VERSION = 1

#: Size of the largest control message, and of the largest result, that either side accepts.
MAX_CONTROL_BYTES = 1 << 20
MAX_RESULT_BYTES = 64 << 20
#: A larger result is sent in parts of this size, so that one whose upload breaks off goes on where it stood.
PART_BYTES = 256 << 10

#: Header of a device that can fetch a blob elsewhere, at the address of a 307; whatever it holds.
DIRECT_HEADER = "edge-direct"
#: Ends a pattern: a bare ``$`` would let one more line feed through.
END = r"$(?!\n)"
Sha256 = Annotated[str, Meta(pattern=f"^[0-9a-f]{{64}}{END}")]
#: 32 bytes of an Ed25519 public key, or 64 of a signature, in standard base64.
PublicKey = Annotated[str, Meta(pattern=f"^[A-Za-z0-9+/]{{43}}={END}")]
SignatureText = Annotated[str, Meta(pattern=f"^[A-Za-z0-9+/]{{86}}=={END}")]
Identifier = Annotated[str, Meta(pattern=f"^[A-Za-z0-9][A-Za-z0-9._-]{{0,127}}{END}")]
Text = Annotated[str, Meta(max_length=2000)]
#: A reason for programs, or none.
ReasonCode = Annotated[str, Meta(pattern=f"^([a-z][a-z0-9_]{{0,63}})?{END}")]
Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]
PositiveCount = Annotated[int, Meta(ge=1, le=1 << 31)]
Seed = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Rate = Annotated[float, Meta(gt=0, le=1e6)]
#: Ways to the slices' gradient: estimated by forward mode, computed by checkpointed backpropagation, or estimated from
#: differences of losses (zero order), for comparison; or the best of the first two that each device can have.
Update = Literal["forward", "backprop", "zero_order", "best"]
#: What a device may take of its own accord.
BestOf = Literal["forward", "backprop"]
#: Kinds of directions, explained in :mod:`edge_runtime.training.tangents`.
Directions = Literal["per_example", "shared", "orthogonal", "gaussian", "filtered", "one_slice", "dealt"]
#: Kinds in which each example has directions of its own; in the others the batch shares a draw's direction.
PER_EXAMPLE: tuple[Directions, ...] = ("per_example", "one_slice", "dealt")
#: Kinds of which each direction moves one slice alone.
ONE_SLICE: tuple[Directions, ...] = ("one_slice", "dealt")
Loss = Literal["cross_entropy", "phuber"]
#: Contents of a result: the change of the trained values, the numbers from which it is computed again, or its sketch.
ReportKind = Literal["weights", "scalars", "sketch"]
#: Ways to train the head: by its exact gradient, perturbed like a slice as published methods do, or solved in closed
#: form from sums that devices make in one pass.
HeadUpdate = Literal["exact", "perturbed", "closed_form"]
#: Ways to make one vector of a text's hidden states; ``package`` is the package's own.
Pooling = Literal["package", "mean", "first", "last", "max"]
#: Numbers of blocks: 0 is the output of the embedding, 1 that of the first block.
Blocks = Annotated[tuple[Count, ...], Meta(max_length=256)]
#: Differences of zero order: (ℓ(θ+hv) - ℓ(θ-hv)) / 2h, or (ℓ(θ+hv) - ℓ(θ)) / h.
Difference = Literal["central", "forward"]
#: The knot of the partially Huberised cross-entropy: it is linear in p below p = 1/τ.
PhuberTau = Annotated[float, Meta(gt=1, le=1e6)]
Share = Annotated[float, Meta(ge=0, le=1)]
LossLimit = Annotated[float, Meta(ge=0, le=1e6)]
#: Ranks that a step trains, explained in :mod:`edge_runtime.training.step_rank`.
RankMode = Literal["fixed", "dynamic", "dynamic_frozen"]
#: Numbers of a sketch; a pursuit takes a row of the projection for each.
SketchSize = Annotated[int, Meta(ge=0, le=1 << 16)]
Candidates = Annotated[int, Meta(ge=1, le=1000)]
#: Most parts that the sums of one device may have in the sums of a chain of runs.
MOST_PARTS = 64
Digests = Annotated[tuple[Sha256, ...], Meta(max_length=MOST_PARTS)]


class EnrolRequest(Struct, frozen=True):
    """A device asks to join, once.

    Attributes:
        token: one-time token.
        device_name: name by which operators call the device.
        device_class: name of the kind of device.
        public_key: public half of the device's own key.
        protocol: version of this protocol.
    """

    token: Annotated[str, Meta(min_length=16, max_length=128)]
    device_name: Identifier
    device_class: Identifier
    public_key: PublicKey
    protocol: PositiveCount = PROTOCOL_VERSION


class EnrolResponse(Struct, frozen=True):
    """The device is enrolled.

    Attributes:
        device_id: id of the device from now on.
        coordinator_public_key: public key that will sign its tasks, which the device pins.
    """

    device_id: Identifier
    coordinator_public_key: PublicKey


class CheckInRequest(Struct, frozen=True):
    """A device offers itself for work.

    Attributes:
        runtime_version: version of the device's program.
        cap_bytes: memory that its operator grants to the worker process.
        floor_bytes: memory that an empty worker takes there; 0 if it was not measured yet.
        example_count: number of rows of its data.
        protocol: version of this protocol.
        setup: digest of what the device is set up with, which changes when its operator changes something; empty from a
            device that does not tell.
        trains: whether it takes tasks; one that does not only fetches releases.
        release: number of the newest release that it has taken or refused; 0 if there was none.
        not_eligible: why it takes no task now, by what its operator asks of its conditions; empty if it would.
        protects: whether it knows how to clip, to add noise and to mask what it contributes.
    """

    runtime_version: Text
    cap_bytes: Bytes
    floor_bytes: Bytes
    example_count: Count
    protocol: PositiveCount = PROTOCOL_VERSION
    setup: Text = ""
    trains: bool = True
    release: Count = 0
    not_eligible: ReasonCode = ""
    protects: bool = False


class LocalOptimizer(Struct, frozen=True):
    """How a device turns gradient estimates into a change of its slices.

    Attributes:
        name: rule of the step: ``"accumulate"`` sums the gradients at the values the task came with, ``"sgd"`` moves
            after every step, ``"adamw"`` normalises on the device, for comparison with published methods, and ``"sgc"``
            does so with moments kept as sketches (``sketch_size``).
        slice_rate: learning rate of the slices.
        head_rate: learning rate of the head.
    """

    name: Literal["accumulate", "sgd", "adamw", "sgc"] = "accumulate"
    slice_rate: Rate = 1.0
    head_rate: Rate = 1.0


class TrainingSettings(Struct, frozen=True, kw_only=True):
    """How slices are trained: what a run's configuration decides and each of its tasks repeats.

    A new setting is one new field here, with a default that asks for what was done before there was one.

    Attributes:
        seed: seed of every random choice: which devices are asked, which rows a step takes, which directions are drawn.
        train_head: whether the head is trained; must be false for a package without a head (language modelling).
        steps: number of local steps of a task; with ``epochs`` the most steps.
        batch_size: number of rows of a step; a device with fewer rows takes all of them.
        draws: number of directions that forward mode or zero order averages over in a step; 1 under
            ``update = "backprop"``. More directions estimate better, and take more time and memory.
        sequence_limit: largest number of tokens of a row, if the package's own limit is not smaller; the rest of the
            row is cut off.
        directions: kind of the directions, whose entries are ±1 unless it says otherwise. ``"one_slice"``: each example
            and draw has its own, which moves one slice, all slices in turn. ``"per_example"``: each example and draw
            has its own, which moves all slices. ``"shared"``: each draw has one for the whole batch. ``"orthogonal"``:
            shared, from the rows of a Hadamard matrix, so that enough draws give the exact gradient. ``"gaussian"``:
            shared, with standard normal entries. ``"filtered"``: of many gaussian ones those nearest to the last
            averaged change. ``"dealt"``: as ``"one_slice"``, with a slice's directions dealt from the rows of Hadamard
            matrices, none twice before all are used. ``update = "zero_order"`` takes neither ``"one_slice"``,
            ``"dealt"`` nor ``"per_example"``.
        loss: loss of a prediction: ``"cross_entropy"``, or ``"phuber"``, the partially Huberised cross-entropy, which
            bounds the pull of wrong labels and is for classification alone.
        update: way to the slices' gradient: ``"forward"`` estimates it by forward mode, ``"backprop"`` computes it by
            checkpointed backpropagation (for packages exported ``--with-adjoint``), ``"zero_order"`` estimates it from
            differences of losses, ``"best"`` leaves it to each device: backpropagation where package, cap, disk and
            deadline allow it, or else forward mode with as many of the ``draws`` as fit.
        report: content of a result: ``"weights"``, the change of the trained values, or ``"scalars"``, the directional
            derivatives, of which the coordinator makes the same change again, not under ``update = "backprop"``; or
            ``"sketch"``, of each slice's change its ``sketch_entries`` largest numbers projected to ``sketch_size``.
        phuber_tau: knot of the loss ``phuber``: where the label has a probability below 1/tau, the loss is a straight
            line.
        head: way to train the head: ``"exact"`` by its gradient; ``"perturbed"`` estimates that like a slice's, as
            published methods do, not under ``update = "backprop"``; ``"closed_form"`` solves for it without a gradient,
            from sums over all rows of each device.
        epochs: number of passes over the device's rows, within ``steps``; 0 takes exactly ``steps`` steps.
        difference: difference that zero order takes of the loss ℓ at θ along v: ``"central"``,
            (ℓ(θ+hv) - ℓ(θ-hv)) / 2h, or ``"forward"``, (ℓ(θ+hv) - ℓ(θ)) / h.
        difference_step: step h of these differences.
        candidates: number of directions drawn for each that ``directions = "filtered"`` keeps; 1 for other kinds.
        jvp_limit: size to which larger directional derivatives are clamped, not under ``update = "backprop"``; unset:
            none is.
        features: numbers of the blocks that the head reads side by side: 0 is the embedding's output, 1 the first
            block's. Empty: the last block alone, as the package has it; under ``head = "closed_form"`` all of them, or
            as many, evenly spread from the first block on, as make 4,096 numbers.
        pooling: way to make one vector of a text's hidden states, for ``features``: ``"package"`` as the package does,
            ``"mean"``, ``"first"`` or ``"last"`` of the real tokens, or ``"max"``.
        sums_dtype: precision in which the sums of ``head = "closed_form"`` travel: ``"float32"``, or ``"float16"`` in
            half the bytes.
        rank_mode: ranks of LoRA slices: ``"fixed"`` trains all of the package's, on every device. Under ``"dynamic"`` a
            device holds as many of the first ranks as its cap allows, and each step trains the first b of them, b
            drawn anew; under ``"dynamic_frozen"`` the b-th alone, with those before it in use.
        sums_projection: number of random projections of a row's features, drawn from ``seed``, of which the sums of
            ``head = "closed_form"`` are: a multiple of 128 below the number of features, for fewer bytes; 0 sums the
            features themselves.
        exits: numbers of the blocks behind which a text may leave the model, all of which share the head: a device has
            those up to the deepest that fits its cap, and each step takes one of them, drawn anew. Empty: the whole
            model, or the blocks that ``features`` names. The run's values are those of the deepest exit.
        sketch_size: number k of numbers to which a slice is sketched, for ``report = "sketch"`` and the local optimiser
            ``"sgc"``: at least seven times ``sketch_entries``, and no more than a slice has; 0 where nothing is.
        sketch_entries: number s of a slice's numbers, the largest, that its sketch stands for.
    """

    seed: Seed
    train_head: bool
    steps: PositiveCount
    batch_size: PositiveCount
    draws: PositiveCount
    sequence_limit: PositiveCount
    directions: Directions = "per_example"
    loss: Loss = "cross_entropy"
    update: Update = "forward"
    report: ReportKind = "weights"
    phuber_tau: PhuberTau = field(default=10.0, name="tau")
    head: HeadUpdate = "exact"
    epochs: Count = 0
    difference: Difference = "central"
    difference_step: Rate = 1e-3
    candidates: Candidates = 1
    jvp_limit: Rate | None = None
    features: Blocks = ()
    pooling: Pooling = "package"
    sums_dtype: Literal["float32", "float16"] = "float32"
    rank_mode: RankMode = "fixed"
    sums_projection: Annotated[int, Meta(ge=0, le=8192)] = 0
    exits: Blocks = ()
    sketch_size: SketchSize = 0
    sketch_entries: SketchSize = 0


class Protection(Struct, frozen=True, forbid_unknown_fields=True):
    """What a device does to its contribution before any of it leaves (:mod:`edge_runtime.training.protected`).

    Attributes:
        clip_norm: largest Euclidean norm of the contribution, to which a longer one is scaled down; None clips none.
        noise_std: standard deviation of the Gaussian noise that is added to each number; 0 adds none.
        masked_bits: bits of the integers that the contribution becomes, to be masked and added up modulo 2 to their
            number; 0 masks nothing.
        quantum: what one of these integers stands for.
        largest: largest size of such an integer; larger ones are cut to it.
    """

    clip_norm: Rate | None = None
    noise_std: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    masked_bits: Literal[0, 32, 64] = 0
    quantum: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    largest: Annotated[int, Meta(ge=1, le=(1 << 62))] = 1

    @property
    def hides(self) -> bool:
        """Whether the coordinator must learn nothing of a single device's rows, not even how many there are."""
        return bool(self.noise_std or self.masked_bits)


class Task(TrainingSettings, frozen=True, kw_only=True):
    """One device's share of a round.

    The slices' gradient is found as ``update`` says, and the head is trained, if ``train_head``, as ``head`` says.
    Tangents are keyed by (seed, round, slot, step, example, draw, slice), so they depend on nothing in which machines
    could differ.

    Attributes:
        task_id: name of the task.
        run_id: name of the run.
        round: number of the round, from 0.
        slot: number of the device within the round.
        package: digest of the package's manifest.
        package_signature: the publisher's signature of the manifest.
        state: digest of the blob that holds the current values of all slices.
        slices: names of the slices to train.
        optimizer: rule and rates by which gradients become a change.
        required_bytes: memory that the coordinator expects the task to take.
        deadline_s: seconds until the result must have arrived.
        freeze_a: whether LoRA's B alone is trained.
        reference: digest of the blob of values that ``filtered`` directions are compared with; under other directions
            of forward mode, of the server's last step, along which the device measures the loss; None without one.
        rank: number of the first ranks that the device is given, trains and hands back; 0 for all of the package's.
        handed_in: digests of the sums that the device handed in to earlier runs, and that stand in the sums which this
            run goes on from: it hands in what has changed since. Empty if there are none.
        protection: what is done to the contribution before it leaves the device; None sends it as it is.
    """

    task_id: Identifier
    run_id: Identifier
    round: Count
    slot: Count
    package: Sha256
    package_signature: SignatureText
    state: Sha256
    slices: tuple[Identifier, ...]
    optimizer: LocalOptimizer
    required_bytes: Bytes
    deadline_s: Seconds
    freeze_a: bool = False
    reference: Sha256 | None = None
    rank: Count = 0
    handed_in: Digests = ()
    protection: Protection | None = None

    @property
    def masked(self) -> bool:
        """Whether the contribution is masked, so that only its sum with others can be read."""
        return self.protection is not None and self.protection.masked_bits > 0

    @property
    def noised(self) -> bool:
        """Whether the device adds noise to its contribution."""
        return self.protection is not None and self.protection.noise_std > 0

    @property
    def direction_slot(self) -> int:
        """The slot that directions are keyed by: 0 for all where only the sum of all devices' scalars is known."""
        return 0 if self.masked and self.report == "scalars" else self.slot


#: The order in which released versions write a task's fields; fields that came later follow as they are defined.
_TASK_ORDER = (
    *(
        "task_id",
        "run_id",
        "round",
        "slot",
        "seed",
        "package",
        "package_signature",
        "state",
        "slices",
        "train_head",
    ),
    *(
        "steps",
        "batch_size",
        "draws",
        "sequence_limit",
        "optimizer",
        "required_bytes",
        "deadline_s",
        "directions",
    ),
    *("loss", "update", "report", "tau", "head", "epochs", "freeze_a", "difference", "difference_step"),
    *("candidates", "reference", "jvp_limit"),
)


def training_settings(of: TrainingSettings) -> dict[str, Any]:
    """The settings by field name, for another struct that has the same fields."""
    return {name: getattr(of, name) for name in TrainingSettings.__struct_fields__}


class SignedTask(Struct, frozen=True, tag_field="answer", tag="task"):
    """A task, signed.

    Attributes:
        task: JSON bytes of a :class:`Task`, as text.
        signature: the coordinator's signature of exactly those bytes.
    """

    task: str
    signature: SignatureText


class Release(Struct, frozen=True, kw_only=True):
    """Values that devices are to use, published by an operator.

    Attributes:
        number: number of the release, which only grows: devices never go back to a lower one by being told of it.
        run_id: name of the run that made the values.
        round: number of the round after which they stood.
        package: digest of the package's manifest.
        package_signature: the publisher's signature of the manifest.
        values: digest of the blob that holds the values of all slices.
        sequence_limit: largest number of tokens of a row, in training and in a device's check.
        lowest_accuracy: least share of right predictions on a device's own rows; a device that finds less keeps what it
            has; None asks for none.
        highest_loss: largest mean cross-entropy there, likewise.
        features: numbers of the blocks that the head reads; empty for the package's own features.
        pooling: way to make one vector of a text's hidden states, for ``features``.
    """

    number: PositiveCount
    run_id: Identifier
    round: Count
    package: Sha256
    package_signature: SignatureText
    values: Sha256
    sequence_limit: PositiveCount
    lowest_accuracy: Share | None = None
    highest_loss: LossLimit | None = None
    features: Blocks = ()
    pooling: Pooling = "package"


class SignedRelease(Struct, frozen=True):
    """A release, signed.

    Attributes:
        release: JSON bytes of a :class:`Release`, as text.
        signature: the coordinator's signature of exactly those bytes.
    """

    release: str
    signature: SignatureText


class ComeBack(Struct, frozen=True, tag_field="answer", tag="come_back"):
    """There is no work now: check in again after a time drawn uniformly from a window.

    Attributes:
        after_min_s: start of the window, in seconds from now.
        after_max_s: end of the window, in seconds from now.
        reason: reason, for people.
        release: newest release, if the device has not decided about it yet.
    """

    after_min_s: Seconds
    after_max_s: Seconds
    reason: Text = ""
    release: SignedRelease | None = None


class NotEligible(Struct, frozen=True, tag_field="answer", tag="not_eligible"):
    """The device cannot serve the current run: check in again after a time drawn uniformly from a window.

    Attributes:
        code: reason, for programs; it never changes.
        message: reason, for people.
        after_min_s: start of the window, in seconds from now.
        after_max_s: end of the window, in seconds from now.
        release: newest release, if the device has not decided about it yet.
    """

    code: Identifier
    message: Text
    after_min_s: Seconds = 60.0
    after_max_s: Seconds = 120.0
    release: SignedRelease | None = None


CheckInResponse = SignedTask | ComeBack | NotEligible


class MemoryReport(Struct, frozen=True):
    """Predicted beside measured memory of one worker, in bytes.

    Attributes:
        predicted_peak_bytes: predicted peak.
        high_water_bytes: high-water mark (VmHWM).
        cap_bytes: memory that the worker was held to.
        cgroup_peak_bytes: largest charge of its control group by the kernel; None without a group.
        anonymous_bytes: the worker's own pages at the end.
        file_bytes: pages of mapped files and shared memory at the end.
        floor_bytes: resident memory before the job.
        phases: high-water mark of each phase.
        enforced_by: means that enforced the cap: ``cgroup_v2``, ``cgroup_v1``, ``rlimit`` or ``none``; empty from a
            device that does not tell.
    """

    predicted_peak_bytes: Bytes
    high_water_bytes: Bytes
    cap_bytes: Bytes
    cgroup_peak_bytes: Bytes | None = None
    anonymous_bytes: Bytes = 0
    file_bytes: Bytes = 0
    floor_bytes: Bytes = 0
    phases: Annotated[dict[Identifier, Bytes], Meta(max_length=100)] = {}
    enforced_by: Text = field(default="", name="judge")


class MaskingKeys(Struct, frozen=True):
    """Keys of one task by which its device masks its contribution (:mod:`edge_runtime.masking`).

    Attributes:
        mask_key: X25519 public key from which masks between two devices come.
        share_key: X25519 public key by which devices seal shares for each other.
        signature: the device's signature of both and of the task, by the key that it enrolled with.
    """

    mask_key: PublicKey
    share_key: PublicKey
    signature: SignatureText


class Result(Struct, frozen=True):
    """The result of a task: the change of the trained values, and what it took.

    Attributes:
        task_id: name of the task.
        run_id: name of the run.
        round: number of the round.
        examples: number of rows that entered applied steps; it weighs the mean over devices.
        steps_applied: number of steps whose gradient was taken.
        steps_skipped: number of steps left out because something was not finite.
        mean_loss: mean loss of these rows; None if no step was applied.
        seconds: time that the task took.
        memory: predicted and measured memory.
        change_sha256: digest of ``change``.
        change: safetensors with one float32 tensor per ``slice/tensor``: values after the task minus values before.
            With ``report = "scalars"`` it holds, in place of the slices, the numbers from which
            :mod:`edge_runtime.training.replay` makes the same change.
        update: way to the slices' gradient that the device took, of a task with ``update = "best"``; else None.
        draws: number of directions of its estimates there; 0 under ``"backprop"``, and of other tasks.
        kept: digests of the sums among ``handed_in`` of the task that still stand; ``change`` is then empty where none
            are added.
        removed: sums among them that stand no more, as they were handed in, to be taken off again; ``change`` then
            holds what stands in their place.
        masking: keys for the masks of the contribution, of a task that asks for them: ``change`` is then empty, and the
            contribution follows masked once it is known who takes part.
    """

    task_id: Identifier
    run_id: Identifier
    round: Count
    examples: Count
    steps_applied: Count
    steps_skipped: Count
    mean_loss: float | None
    seconds: Seconds
    memory: MemoryReport
    change_sha256: Sha256
    change: Annotated[bytes, Meta(max_length=MAX_RESULT_BYTES)]
    update: BestOf | None = None
    draws: Count = 0
    kept: Digests = ()
    removed: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_RESULT_BYTES)], ...], Meta(max_length=MOST_PARTS)
    ] = ()
    masking: MaskingKeys | None = None


class ResultReceipt(Struct, frozen=True):
    """A result has arrived.

    Attributes:
        status: ``counted`` the first time, ``duplicate`` when the same result arrives again.
    """

    status: Literal["counted", "duplicate"]


#: Most other devices that one shares its secrets with.
MOST_PEERS = 256
SlotNumber = Annotated[int, Meta(ge=0, le=10_000)]
Slots = Annotated[tuple[SlotNumber, ...], Meta(max_length=MOST_PEERS + 1)]
#: Two shares of 33 bytes, sealed; and one share by itself.
SealedBytes = Annotated[bytes, Meta(min_length=16, max_length=256)]
ShareBytes = Annotated[bytes, Meta(min_length=33, max_length=33)]


class Peer(Struct, frozen=True):
    """Another device of a masked round, as its neighbours are told of it.

    Attributes:
        slot: its slot of the round.
        task_id: name of its task.
        identity: public key that it enrolled with.
        keys: keys of its task, signed by it.
    """

    slot: SlotNumber
    task_id: Identifier
    identity: PublicKey
    keys: MaskingKeys


class SealedShare(Struct, frozen=True):
    """Shares of one device's two secrets, sealed for another.

    Attributes:
        slot: slot of the device that they go to, or that they come from.
        sealed: the sealed bytes.
    """

    slot: SlotNumber
    sealed: SealedBytes


class RevealedShare(Struct, frozen=True):
    """A share of one secret of a device: of its own mask if it contributed, of its mask key if it fell out.

    Attributes:
        slot: slot of the device whose secret it is of.
        share: the share.
    """

    slot: SlotNumber
    share: ShareBytes


class SealedShares(Struct, frozen=True):
    """The shares that a device sends to its neighbours.

    Attributes:
        shares: one for each neighbour.
    """

    shares: Annotated[tuple[SealedShare, ...], Meta(max_length=MOST_PEERS)]


class RevealedShares(Struct, frozen=True):
    """The shares that take masks off a sum.

    Attributes:
        shares: one for each neighbour that had sent shares, and of the device's own mask.
    """

    shares: Annotated[tuple[RevealedShare, ...], Meta(max_length=MOST_PEERS + 1)]


class MaskingWait(Struct, frozen=True, tag_field="stage", tag="wait"):
    """Others are not as far yet.

    Attributes:
        again_s: time after which the device asks again.
    """

    again_s: Seconds


class ShareSecrets(Struct, frozen=True, tag_field="stage", tag="share"):
    """Who takes part is known: the device sends its neighbours shares of its secrets.

    Attributes:
        threshold: number of shares that give a secret back; more than half of those that hold one.
        peers: the neighbours.
    """

    threshold: Annotated[int, Meta(ge=2, le=MOST_PEERS + 1)]
    peers: Annotated[tuple[Peer, ...], Meta(max_length=MOST_PEERS)]


class SendMasked(Struct, frozen=True, tag_field="stage", tag="masked"):
    """The shares of the neighbours: the device sends its contribution, masked.

    Attributes:
        shares: what neighbours sealed for the device; those that are missing fell out, and share no mask.
    """

    shares: Annotated[tuple[SealedShare, ...], Meta(max_length=MOST_PEERS)]


class Unmask(Struct, frozen=True, tag_field="stage", tag="unmask"):
    """Who contributed is known: the device reveals one share of each neighbour.

    Attributes:
        contributed: slots of neighbours, and of the device itself, of whose own mask a share is asked for.
        fell_out: slots of neighbours of whose mask key a share is asked for.
    """

    contributed: Slots
    fell_out: Slots


class MaskingOver(Struct, frozen=True, tag_field="stage", tag="over"):
    """Nothing more is asked of the device for this task.

    Attributes:
        reason: why, for people.
    """

    reason: Text = ""


MaskingStage = MaskingWait | ShareSecrets | SendMasked | Unmask | MaskingOver


class Standing(Struct, frozen=True):
    """How a task stands that a device said it works on.

    Attributes:
        again_s: time after which the device says so again; a device that falls silent for several of them is taken for
            lost, and its place goes to another.
        wanted: whether its result would still be taken.
    """

    again_s: Seconds
    wanted: bool = True


class UploadStanding(Struct, frozen=True):
    """How far a result has come whose upload goes in parts.

    Attributes:
        received_bytes: bytes that are here; the next part begins with the byte after them.
        counted: whether a result of the task was counted already, so that no byte of it is wanted.
    """

    received_bytes: Bytes
    counted: bool = False


class DeviceEvent(Struct, frozen=True):
    """An event on a device that operators want to know of. It never holds data values.

    Attributes:
        code: kind of event, for programs.
        message: description, for people.
        task_id: name of the task; None outside a task.
        lasting: whether the cause stays until somebody changes something on the device or in the run, so that the next
            task would meet it too.
    """

    code: Identifier
    message: Text
    task_id: Identifier | None = None
    lasting: bool = False


class Refusal(Struct, frozen=True):
    """Body of every 4xx answer.

    Attributes:
        code: reason, for programs.
        message: reason, for people.
    """

    code: Identifier
    message: Text


def encode(message: Struct) -> bytes:
    """JSON bytes of a control message."""
    if isinstance(message, Task):
        table = msgspec.to_builtins(message)
        return msgspec.json.encode({name: table[name] for name in dict.fromkeys((*_TASK_ORDER, *table))})
    return msgspec.json.encode(message)


MessageT = TypeVar("MessageT")


def decode(data: bytes, kind: type[MessageT]) -> MessageT:
    """Parse a JSON control message.

    Raises:
        ProtocolError: it is too long or malformed; names the field.
    """
    if len(data) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes exceeds the limit of {MAX_CONTROL_BYTES}")
    try:
        return msgspec.json.decode(data, type=kind)
    except MALFORMED as error:
        raise ProtocolError(f"malformed {_name(kind)}: {error}") from error


def encode_result(result: Result) -> bytes:
    """MessagePack bytes of a result."""
    return msgspec.msgpack.encode(result)


def decode_result(data: bytes) -> Result:
    """Parse a result.

    Raises:
        ProtocolError: it is too long or malformed; names the field.
    """
    if len(data) > MAX_RESULT_BYTES:
        raise ProtocolError(f"result of {len(data)} bytes exceeds the limit of {MAX_RESULT_BYTES}")
    try:
        return msgspec.msgpack.decode(data, type=Result)
    except MALFORMED as error:
        raise ProtocolError(f"malformed Result: {error}") from error


def _name(kind: object) -> str:
    return getattr(kind, "__name__", str(kind))
