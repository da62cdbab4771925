"""The memory-budget report as one typed document: what was measured, what was predicted, and what follows.

Measured facts are fields. Everything that follows from them (verdict, headroom, unexplained rest, prediction error) is
a property, so that a report cannot contradict itself. The JSON form carries the derived values as well, for programs
that only want the verdict; reading it back ignores them and derives them anew.

An earlier report comes from outside, so every size, count and text in it is bounded here, and an error names what
exceeds its bound. All sizes are in bytes, all times in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import ConfigError
from edge_runtime.memory.enforcement import EnforcedBy
from edge_runtime.memory.plan import WeightsMode
from edge_runtime.protocol.messages import Bytes, Count, PositiveCount, Seconds, Sha256, Update

FORMAT_VERSION = 1
#: Size of the largest report that is read back.
MAX_DOCUMENT_BYTES = 4 << 20
#: Largest number of samples in a report; :func:`thin` brings a longer timeline below it.
MAX_SAMPLES = 4096
#: Share of the peak that may lie outside all bins before the report says that its bins do not explain it.
UNEXPLAINED_SHARE = 0.05
#: Growth of the peak over an earlier report's, as a share, that is no regression.
TOLERANCE = 0.05
#: Name of the row after the bins, for memory that belongs to none of them.
UNEXPLAINED = "unexplained"

# Reports are printed on terminals: neither control characters nor marks that turn the writing direction.
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]*\Z"
Name = Annotated[str, Meta(min_length=1, max_length=120, pattern=_PRINTABLE)]
Note = Annotated[str, Meta(max_length=1000, pattern=_PRINTABLE)]
Moment = Annotated[
    str, Meta(pattern=r"^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}(\.[0-9]{1,6})?(Z|\+00:00)\Z")
]
PositiveBytes = Annotated[int, Meta(ge=1, le=1 << 50)]
#: A slope, which is negative where memory was given back.
BytesPerStep = Annotated[float, Meta(ge=-1e15, le=1e15)]
EdgeSize = Literal["batch_size", "sequence", "draws"]
Failure = Literal["killed", "over_cap", "charge_over_cap", "leak"]


class ProfileIdentity(Struct, frozen=True):
    """What was measured, and on which machine.

    Attributes:
        device: model of the device.
        kernel: name and version of its kernel.
        cpu: type of its CPU.
        page_size_bytes: size of a page of memory.
        memory_bytes: size of its memory.
        runtime_version: version of this program.
        engine: name and version of the inference engine.
        package_name: name of the package.
        package_sha256: digest that names the package.
        arithmetic: arithmetic that the package was run in.
        command: command line that repeats the measurement.
    """

    device: Name
    kernel: Name
    cpu: Name
    page_size_bytes: PositiveBytes
    memory_bytes: PositiveBytes
    runtime_version: Name
    engine: Name
    package_name: Name
    package_sha256: Sha256
    arithmetic: Name
    command: Note


class WorkRecord(Struct, frozen=True):
    """What the worker did.

    Attributes:
        batch_size: number of examples of a step.
        micro_batch: number of examples at a time.
        sequence: number of tokens of an example.
        draws: number of directions of each example.
        slices: names of the trained slices.
        weights: whether weights stayed in memory or passed through it.
        steps: number of steps.
        threads: number of threads of the engine.
        gave_up: sentences that say what the plan gave up to fit the cap, in the planner's order.
        update: way to the slices' gradient.
    """

    batch_size: PositiveCount
    micro_batch: PositiveCount
    sequence: PositiveCount
    draws: Count
    slices: Annotated[tuple[Name, ...], Meta(max_length=512)]
    weights: WeightsMode
    steps: Count
    threads: PositiveCount
    gave_up: Annotated[tuple[Name, ...], Meta(max_length=16)] = ()
    update: Update = "forward"


class Bin(Struct, frozen=True):
    """One part of the peak.

    Attributes:
        name: name of the part.
        predicted_bytes: its predicted size.
        measured_bytes: its measured size; None where it could not be told from other parts.
        note: remark for the reader.
    """

    name: Name
    predicted_bytes: Bytes
    measured_bytes: Bytes | None
    note: Note = ""


class TimelineSample(Struct, frozen=True):
    """Memory at one moment.

    Attributes:
        seconds: time since the worker started.
        phase: phase that the worker was in.
        resident_bytes: pages in memory.
        anonymous_bytes: the worker's own pages.
        file_bytes: pages of mapped files and shared memory.
    """

    seconds: Seconds
    phase: Name
    resident_bytes: Bytes
    anonymous_bytes: Bytes
    file_bytes: Bytes


class PhasePeak(Struct, frozen=True):
    """High-water mark within one phase.

    Attributes:
        name: name of the phase, such as start, load, step or serialise.
        peak_bytes: high-water mark within it.
        seconds: time that it took.
    """

    name: Name
    peak_bytes: Bytes
    seconds: Seconds


class LiveTensor(Struct, frozen=True):
    """A tensor alive at the peak.

    Attributes:
        name: name in the program.
        program: program that holds it.
        operator: operator that made it.
        shape: shape as text, such as ``1 × 128 × 3072``.
        bytes: its size.
        what: what it is, in words; empty in an older report.
    """

    name: Name
    program: Name
    operator: Name
    shape: Name
    bytes: Bytes
    what: Note = ""


class WhatIf(Struct, frozen=True):
    """Another size of the work, as the planner predicts it.

    Attributes:
        batch_size: number of examples of a step.
        micro_batch: number of examples at a time.
        sequence: number of tokens of an example.
        draws: number of directions of each example.
        slices: number of trained slices.
        weights: whether weights stay in memory or pass through it.
        predicted_peak_bytes: predicted peak.
        predicted_step_s: predicted time of a step; None where the machine was not measured.
        fits: whether the peak fits the cap.
        chosen: whether this is the work that was run.
        draws_at_a_time: number of draws at a time; 0 in an older report, which does not tell.
    """

    batch_size: PositiveCount
    micro_batch: PositiveCount
    sequence: PositiveCount
    draws: Count
    slices: Count
    weights: WeightsMode
    predicted_peak_bytes: Bytes
    predicted_step_s: Seconds | None
    fits: bool
    chosen: bool
    draws_at_a_time: Count = 0


class Edge(Struct, frozen=True):
    """How far one size of the work may go under the cap, all else as it was run. Sizes are tried in doublings.

    Attributes:
        size: the size that is varied.
        largest: the largest size tried that fits; None if none does.
        first_over: the smallest size tried that does not fit; None if all up to the bound fit.
        bound: largest size that may be asked for.
    """

    size: EdgeSize
    largest: WhatIf | None
    first_over: WhatIf | None
    bound: PositiveCount


class WorstCase(Struct, frozen=True):
    """The largest step that the task allows, as the planner predicts it, and the caps that follow.

    Attributes:
        batch_size: number of examples of a step that was asked for.
        sequence: number of tokens that rows may have.
        predicted_peak_bytes: predicted peak of the plan that would be chosen; of the smallest if none fits.
        fits: whether a plan for it fits the cap.
        gave_up: sentences that say what that plan gives up to fit.
        smallest_cap_bytes: smallest cap under which a plan for it fits, a whole number of MiB.
        advised_cap_bytes: smallest round cap under which it runs as in that plan, a whole number of MiB.
    """

    batch_size: PositiveCount
    sequence: PositiveCount
    predicted_peak_bytes: Bytes
    fits: bool
    gave_up: Annotated[tuple[Name, ...], Meta(max_length=16)]
    smallest_cap_bytes: PositiveBytes
    advised_cap_bytes: PositiveBytes


class Growth(Struct, frozen=True):
    """The leak check: how anonymous memory changed from step to step.

    Attributes:
        steps: number of steps that were checked.
        first_bytes: anonymous memory after the first of them.
        last_bytes: anonymous memory after the last of them.
        per_step_bytes: slope over the steps.
        limit_per_step_bytes: largest slope that is no leak.
        warm_up: number of steps before them that were left out.
    """

    steps: PositiveCount
    first_bytes: Bytes
    last_bytes: Bytes
    per_step_bytes: BytesPerStep
    limit_per_step_bytes: BytesPerStep
    warm_up: Count = 0

    @property
    def leaks(self) -> bool:
        """Whether memory grew by more than the limit with each step."""
        return self.per_step_bytes > self.limit_per_step_bytes


class Comparison(Struct, frozen=True):
    """The same batch done another way.

    Attributes:
        name: name of the way.
        peak_bytes: its high-water mark.
        step_s: time of a step; None where none was timed.
        note: remark for the reader.
    """

    name: Name
    peak_bytes: PositiveBytes
    step_s: Seconds | None
    note: Note = ""


class Measuring(Struct, frozen=True):
    """What measuring itself cost.

    Attributes:
        samples: number of looks at the worker.
        seconds: time that they took together.
        note: remark for the reader.
    """

    samples: Count
    seconds: Seconds
    note: Note = ""


class LedgerRow(Struct, frozen=True):
    """A bin, or the rest that closes the sum.

    Attributes:
        name: name of the row.
        predicted_bytes: its predicted size.
        measured_bytes: its measured size, negative for a rest where the bins overlap; None where it could not be told.
        note: remark for the reader.
    """

    name: str
    predicted_bytes: int
    measured_bytes: int | None
    note: str


class Profile(Struct, frozen=True, kw_only=True):
    """One measured run against its cap.

    Attributes:
        format_version: version of this form.
        created: moment of the measurement.
        identity: device, package and program of the measurement.
        work: size of the work, and how it was done.
        cap_bytes: memory that the worker was held to.
        peak_bytes: the worker's high-water mark (VmHWM).
        charged_peak_bytes: largest charge of its control group by the kernel; None without a group.
        enforced_by: means that held the worker to the cap.
        enforcement_note: reason why no better means did; empty if the best one did.
        predicted_peak_bytes: predicted peak.
        bins: parts of the peak.
        timeline: memory over time.
        phases: high-water marks of the phases, in their order.
        tensors: largest tensors alive at the peak.
        what_if: other sizes of the work.
        growth: the leak check; None if there were too few steps for it.
        comparisons: other ways to do the same batch, this one first.
        step_s: median time of a step; None if no step was finished.
        measuring: cost of measuring.
        killed: whether the kernel killed the worker.
        notes: other things that a reader should know, a sentence or two each.
        worst_case: the largest step that the task allows; None in an older report.
        edges: how far each size of the work may go.
    """

    format_version: PositiveCount = FORMAT_VERSION
    created: Moment
    identity: ProfileIdentity
    work: WorkRecord
    cap_bytes: PositiveBytes
    peak_bytes: PositiveBytes
    charged_peak_bytes: Bytes | None
    enforced_by: EnforcedBy = field(name="judge")
    enforcement_note: Note = field(default="", name="judge_note")
    predicted_peak_bytes: PositiveBytes
    bins: Annotated[tuple[Bin, ...], Meta(max_length=32)]
    timeline: Annotated[tuple[TimelineSample, ...], Meta(max_length=MAX_SAMPLES)]
    phases: Annotated[tuple[PhasePeak, ...], Meta(max_length=32)]
    tensors: Annotated[tuple[LiveTensor, ...], Meta(max_length=64)]
    what_if: Annotated[tuple[WhatIf, ...], Meta(max_length=256)]
    growth: Growth | None
    comparisons: Annotated[tuple[Comparison, ...], Meta(max_length=16)]
    step_s: Seconds | None
    measuring: Measuring
    killed: bool = False
    notes: Annotated[tuple[Note, ...], Meta(max_length=16)] = ()
    worst_case: WorstCase | None = None
    edges: Annotated[tuple[Edge, ...], Meta(max_length=8)] = ()

    @property
    def failures(self) -> tuple[Failure, ...]:
        """All reasons why the run did not keep to its budget; empty if it passed."""
        return tuple(self._failures())

    def _failures(self) -> Iterator[Failure]:
        if self.killed:
            yield "killed"
        if self.peak_bytes > self.cap_bytes:
            yield "over_cap"
        if self.charged_peak_bytes is not None and self.charged_peak_bytes > self.cap_bytes:
            yield "charge_over_cap"
        if self.growth is not None and self.growth.leaks:
            yield "leak"

    @property
    def verdict(self) -> Literal["PASS", "FAIL"]:
        """Whether the run kept to its budget."""
        return "FAIL" if self.failures else "PASS"

    @property
    def headroom_bytes(self) -> int:
        """Bytes between the high-water mark and the cap; negative if the mark lies above the cap."""
        return self.cap_bytes - self.peak_bytes

    @property
    def headroom_share(self) -> float:
        """Headroom as a share of the cap."""
        return self.headroom_bytes / self.cap_bytes

    @property
    def unexplained_bytes(self) -> int:
        """The peak less all measured bins; negative if the bins overlap."""
        return self.peak_bytes - sum(bin_.measured_bytes or 0 for bin_ in self.bins)

    @property
    def unexplained_share(self) -> float:
        """The unexplained rest as a share of the peak."""
        return self.unexplained_bytes / self.peak_bytes

    @property
    def is_split(self) -> bool:
        """Whether any bin was measured; a worker that was killed cannot tell."""
        return any(bin_.measured_bytes is not None for bin_ in self.bins)

    @property
    def is_explained(self) -> bool:
        """Whether the bins account for the peak closely enough to be trusted."""
        return abs(self.unexplained_share) < UNEXPLAINED_SHARE

    @property
    def prediction_error(self) -> float:
        """Error of the prediction as a share of the measured peak; positive if the prediction was too high."""
        return (self.predicted_peak_bytes - self.peak_bytes) / self.peak_bytes

    @property
    def owner(self) -> PhasePeak | None:
        """The phase with the highest mark, the first of equals; None if no phase was measured."""
        return max(self.phases, key=lambda phase: phase.peak_bytes, default=None)

    @property
    def highest_sample(self) -> TimelineSample | None:
        """The sample with the most resident memory, the first of equals; None without a timeline."""
        return max(self.timeline, key=lambda sample: sample.resident_bytes, default=None)

    @property
    def ledger(self) -> tuple[LedgerRow, ...]:
        """All bins and the unexplained rest. Each column adds up to its peak exactly."""
        rows = [LedgerRow(b.name, b.predicted_bytes, b.measured_bytes, b.note) for b in self.bins]
        unpredicted = self.predicted_peak_bytes - sum(b.predicted_bytes for b in self.bins)
        return (*rows, LedgerRow(UNEXPLAINED, unpredicted, self.unexplained_bytes, ""))


def thin(samples: tuple[TimelineSample, ...], count: int) -> tuple[TimelineSample, ...]:
    """Fewer samples of a timeline: its ends, and the highest of each stretch.

    The highest sample of all is always among them; of equal ones it is the first.

    Args:
        samples: samples in order of time.
        count: largest number of samples to return, at least 3.
    """
    if len(samples) <= count:
        return samples
    inner, stretches = samples[1:-1], max(1, count - 2)
    edges = [len(inner) * i // stretches for i in range(stretches + 1)]
    highest = (max(inner[a:b], key=lambda sample: sample.resident_bytes) for a, b in pairwise(edges) if a < b)
    return (samples[0], *highest, samples[-1])


def encode_profile(profile: Profile) -> bytes:
    """Indented JSON with the derived values beside the measured ones, ending with a newline.

    Raises:
        ConfigError: the profile breaks one of this module's bounds, so it could not be read back.
    """
    content = msgspec.to_builtins(profile)
    try:
        _check(msgspec.convert(content, Profile))
    except msgspec.ValidationError as error:
        raise ConfigError(f"the memory report cannot be written: {error}") from error
    owner = profile.owner
    content["derived"] = {
        "verdict": profile.verdict,
        "failures": profile.failures,
        "headroom_bytes": profile.headroom_bytes,
        "headroom_share": profile.headroom_share,
        "unexplained_bytes": profile.unexplained_bytes,
        "unexplained_share": profile.unexplained_share,
        "prediction_error": profile.prediction_error,
        "peak_phase": None if owner is None else owner.name,
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def decode_profile(data: bytes) -> Profile:
    """Read a report that was written earlier, perhaps on another machine.

    Raises:
        ConfigError: it is too large, is no report, has a newer version, or breaks a bound; names the field in one line.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ConfigError(
            f"the memory report has {len(data)} bytes, more than the limit of {MAX_DOCUMENT_BYTES}"
        )
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"the memory report has format {version}, this program reads up to {FORMAT_VERSION}: "
                f"read it with the newer edge-runtime that wrote it"
            )
        profile = msgspec.json.decode(data, type=Profile)
        _check(profile)
    except MALFORMED as error:
        # A message may quote what it found: one line of it is enough.
        raise ConfigError(f"malformed memory report: {' '.join(str(error).split())[:300]}") from error
    return profile


class _Version(Struct):
    format_version: PositiveCount


def _check(profile: Profile) -> None:
    """Check the bounds that span several fields, with errors like those of a single field."""
    _refuse_doubles("bins", [bin_.name for bin_ in profile.bins] + [UNEXPLAINED])
    _refuse_doubles("phases", [phase.name for phase in profile.phases])
    for index, (earlier, later) in enumerate(pairwise(profile.timeline)):
        if later.seconds < earlier.seconds:
            raise msgspec.ValidationError(f"Time runs backwards - at `$.timeline[{index + 1}].seconds`")
    if sum(option.chosen for option in profile.what_if) > 1:
        raise msgspec.ValidationError("More than one option is chosen - at `$.what_if`")


def _refuse_doubles(field: str, names: list[str]) -> None:
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise msgspec.ValidationError(f"The name {name!r} is taken twice - at `$.{field}`")


class Change(Struct, frozen=True):
    """One figure before and now.

    Attributes:
        name: name of the figure.
        unit: its unit.
        old: figure of the earlier report; None if that does not have it.
        new: figure of this report; None if it does not have it.
    """

    name: str
    unit: Literal["bytes", "seconds"]
    old: float | None
    new: float | None

    @property
    def share(self) -> float | None:
        """Growth as a share of the old figure; None where that is missing or zero."""
        return None if self.old is None or self.new is None or not self.old else self._growth / abs(self.old)

    def grew(self, tolerance: float) -> bool:
        """Whether both reports have the figure and it grew by more than ``tolerance``, as a share of the old one."""
        return self.old is not None and self._growth > abs(self.old) * tolerance

    @property
    def _growth(self) -> float:
        return 0.0 if self.old is None or self.new is None else self.new - self.old


class Difference(Struct, frozen=True):
    """A report compared with an earlier one.

    Attributes:
        old_created: moment of the earlier measurement.
        new_created: moment of this measurement.
        tolerance: growth that is accepted, as a share of the old figure.
        peak: the peak.
        others: other figures.
        bins: parts of the peak.
        notes: whatever else differs between the two reports, a line each, so that nobody takes a change of device or
            settings for one of the program.
    """

    old_created: str
    new_created: str
    tolerance: float
    peak: Change
    others: tuple[Change, ...]
    bins: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def changes(self) -> tuple[Change, ...]:
        """All figures: the peak, then the others, then the bins."""
        return (self.peak, *self.others, *self.bins)

    @property
    def grown(self) -> tuple[Change, ...]:
        """The figures that grew by more than the tolerance."""
        return tuple(change for change in self.changes if change.grew(self.tolerance))

    @property
    def regressed(self) -> bool:
        """Whether the peak grew by more than the tolerance."""
        return self.peak.grew(self.tolerance)


#: Fields of the work that were asked for; the others (micro-batch, weights, threads) say how it was done.
_ASKED = ("batch_size", "sequence", "draws", "slices", "update")
_DONE = ("micro_batch", "weights", "threads", "steps", "gave_up")
_PLACE = (
    "package_sha256",
    "arithmetic",
    "device",
    "kernel",
    "cpu",
    "page_size_bytes",
    "engine",
    "runtime_version",
)


def compare(old: Profile, new: Profile, tolerance: float = TOLERANCE, *, unlike: bool = False) -> Difference:
    """Compare a report with an earlier one.

    Args:
        old: the earlier report.
        new: this report.
        tolerance: growth that is accepted, as a share of the old figure, from 0 to 10.
        unlike: whether to compare although package name or work differ; the notes then say that they do.

    Raises:
        ConfigError: the tolerance is out of range; or the reports are of different packages or work.
    """
    if not 0 <= tolerance <= 10:
        raise ConfigError(f"a tolerance of {tolerance} is not between 0 and 10")
    apart = [
        *_differing(old.identity, new.identity, ("package_name",)),
        *_differing(old.work, new.work, _ASKED),
    ]
    if apart and not unlike:
        raise ConfigError(
            f"the earlier report is of other work ({'; '.join(apart)}): compare reports of the same package "
            f"and work"
        )
    before = {bin_.name: bin_.measured_bytes for bin_ in old.bins} | {UNEXPLAINED: old.unexplained_bytes}
    now = {bin_.name: bin_.measured_bytes for bin_ in new.bins} | {UNEXPLAINED: new.unexplained_bytes}
    return Difference(
        old_created=old.created,
        new_created=new.created,
        tolerance=tolerance,
        peak=Change("peak", "bytes", old.peak_bytes, new.peak_bytes),
        others=(
            Change("kernel's charge", "bytes", old.charged_peak_bytes, new.charged_peak_bytes),
            Change("predicted peak", "bytes", old.predicted_peak_bytes, new.predicted_peak_bytes),
            Change("step", "seconds", old.step_s, new.step_s),
        ),
        bins=tuple(
            Change(name, "bytes", before.get(name), now.get(name))
            for name in [*(row.name for row in new.ledger), *(name for name in before if name not in now)]
        ),
        notes=(
            *(f"other work: {text}" for text in apart),
            *_differing(old.identity, new.identity, _PLACE),
            *_differing(old.work, new.work, _DONE),
            *_differing(old, new, ("cap_bytes", "enforced_by")),
        ),
    )


def _differing(old: Struct, new: Struct, fields: tuple[str, ...]) -> list[str]:
    pairs = [(field.replace("_", " "), getattr(old, field), getattr(new, field)) for field in fields]
    return [f"{name} was {_short(a)}, is {_short(b)}" for name, a, b in pairs if a != b]


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
