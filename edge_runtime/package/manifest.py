"""The package: what the exporter writes, the coordinator serves and the device opens.

A package is a folder::

    manifest.json       this module's Manifest, as canonical JSON; its sha256 names the package
    manifest.sig        Ed25519 signature over the manifest's bytes, in base64
    programs/*.onnx     graphs without weights, for ONNX Runtime
    programs/*.pte      the same for ExecuTorch, where the package was exported for it
    weights/*.bin       raw little-endian tensors, aligned so that they can be memory-mapped
    tokenizer.json      the tokenizer, as ``tokenizers`` reads it
    slices.safetensors  initial values of all trainable tensors

The manifest lists every other file with size and sha256; the signature therefore covers everything.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edge_runtime.decoding import MALFORMED
from edge_runtime.engines.names import ENGINES, EngineName
from edge_runtime.errors import FormatVersionError, PackageError
from edge_runtime.protocol.messages import Bytes, Count, Identifier, PositiveCount, Sha256, Text
from edge_runtime.slices.kinds import KINDS

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
MAX_MANIFEST_BYTES = 16 << 20
HASH_CHUNK_BYTES = 1 << 20

#: A path inside the package: no absolute paths, no way up.
PackagePath = Annotated[
    str, Meta(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*/){0,3}[A-Za-z0-9_-][A-Za-z0-9._-]*$(?!\n)")
]
Shape = tuple[Count, ...]
#: Arithmetics in which products with frozen matrices are computed (export/lowering/arithmetic.py holds the formulas).
Arithmetic = Literal["row_int8", "block_int8", "block_int4", "float"]
ARITHMETICS: tuple[Arithmetic, ...] = ("row_int8", "block_int8", "block_int4", "float")
#: Tasks of a package: ``classification`` predicts one label a text, by a head; ``causal_lm`` predicts the next token.
TaskKind = Literal["classification", "causal_lm"]
#: The dynamic sides of a program's inputs.
Axis = Literal["draws", "batch", "sequence"]
Quantisation = Literal["int8", "int4", "none"]
#: How the features of a classifier's head are made of the last hidden states: their mean over real tokens, the first
#: token's or the last real token's, each divided by its root mean square; or by the pooling and the frozen layers of
#: the classifier that the model folder had (``own``), as they are.
#: A run's head over several blocks may also take the largest over real tokens (``max``).
Features = Literal["mean", "first", "last", "own", "max"]
#: Arithmetics that use matrices as the package stores them; the engine repacks these when it loads a program.
BLOCK_ARITHMETICS: frozenset[Arithmetic] = frozenset({"block_int8", "block_int4"})
#: A quantised matrix X (N outputs, K inputs) is stored as levels and scales: uint8 (N, K/32, 32), float32 (N, K/32).
#: One with zero points has 4 bits: levels uint8 (N, K/B, B/2), zero points uint8 (N, ceil(K/B/2)), two in a byte.
LEVELS_SUFFIX, SCALES_SUFFIX, ZERO_POINTS_SUFFIX = "_levels", "_scales", "_zero_points"
#: Suffixes of what a device makes of such a matrix: int8 (K, N) with float32 (N) scales, or float32 (K, N).
INT8_SUFFIX, INT8_SCALES_SUFFIX, FLOAT_SUFFIX = "_int8", "_int8_scales", "_float"


class FileEntry(Struct, frozen=True):
    """Size and digest of one file of the package.

    Attributes:
        bytes: size in bytes.
        sha256: sha256 in hex.
    """

    bytes: Bytes
    sha256: Sha256


class TensorRef(Struct, frozen=True):
    """Place of a frozen tensor: raw little-endian bytes in a file.

    Attributes:
        file: path of the file.
        offset: offset of its first byte.
        dtype: dtype of the tensor.
        shape: shape of the tensor.
    """

    file: PackagePath
    offset: Bytes
    dtype: Literal["float32", "uint8", "int8", "int64", "int32", "bool"]
    shape: Shape


class SizeTerm(Struct, frozen=True, array_like=True):
    """``coefficient · batch^batch_power · sequence^sequence_power · draws^draws_power`` bytes.

    Attributes:
        coefficient: factor in bytes.
        batch_power: power of the number of examples.
        sequence_power: power of the number of tokens of an example; in a decode program, of new tokens.
        draws_power: power of the number of draws; in a decode program, of the tokens seen so far, new ones among them.
    """

    coefficient: float
    batch_power: int = 0
    sequence_power: int = 0
    draws_power: int = 0


class PeakTensor(Struct, frozen=True):
    """A tensor alive where a program's live set is largest.

    Attributes:
        name: name in the program.
        operator: operator that made it.
        shape: sides as numbers, or as names of dynamic sides such as ``batch`` or ``batch*sequence``.
        size: size in bytes.
    """

    name: Text
    operator: Text
    shape: tuple[Text, ...]
    size: SizeTerm


class Undelegated(Struct, frozen=True, array_like=True):
    """An operator of an ExecuTorch program that its fast backend did not take.

    Attributes:
        operator: name of the operator.
        nodes: number of its nodes.
        reason: reason why the backend did not take it.
    """

    operator: Text
    nodes: PositiveCount
    reason: Text


class Variant(Struct, frozen=True):
    """A program in one arithmetic.

    Attributes:
        file: path of the program.
        fed: frozen tensors that the program takes as inputs, so that one load serves every segment of equal structure.
        bound: frozen tensors that the engine repacks when it loads the program, so that each segment needs a load of
            its own.
        gathered: fed tensors of which only some rows are read, and for each the program input that names those rows.
        live: largest live sets as polynomials; their largest value at a given size is the predicted one.
        peak_tensors: largest tensors of the live set at the exporter's reference size.
        planned_bytes: memory that a loaded ExecuTorch program holds, whatever it is run on, because it was planned
            ahead.
        bounds: largest sizes that an ExecuTorch program was planned for.
        undelegated: operators of an ExecuTorch program that its own kernels compute.
        signed: path of the same program with activations in int8 instead of uint8, for processors that like it better;
            None if the package has none, or no activation is rounded.
    """

    file: PackagePath
    fed: tuple[Text, ...]
    bound: tuple[Text, ...] = ()
    gathered: dict[Text, Text] = {}
    live: tuple[tuple[SizeTerm, ...], ...] = ()
    peak_tensors: tuple[PeakTensor, ...] = ()
    planned_bytes: Bytes = 0
    bounds: dict[Axis, PositiveCount] = {}
    undelegated: Annotated[tuple[Undelegated, ...], Meta(max_length=1000)] = ()
    signed: PackagePath | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the program, with either sign."""
        return (self.file,) if self.signed is None else (self.file, self.signed)


class Program(Struct, frozen=True):
    """One graph. Values flow by name: an output named ``hidden`` feeds a later input ``hidden``.

    Attributes:
        inputs: names of the inputs, frozen tensors not among them.
        outputs: names of the outputs.
        variants: the graph in each arithmetic that the package offers on ONNX Runtime.
        executorch: the same for ExecuTorch; empty if the package was not exported for it.
        packed: the graph once more with its matrices bound instead of fed, in arithmetics where that gives the same
            bits, for workers that answer many short texts; empty for programs that training alone runs.
    """

    inputs: tuple[Text, ...]
    outputs: tuple[Text, ...]
    variants: dict[Arithmetic, Variant]
    executorch: dict[Arithmetic, Variant] = {}
    packed: dict[Arithmetic, Variant] = {}


class TensorSpec(Struct, frozen=True):
    """A trainable tensor.

    Attributes:
        name: name within its slice.
        shape: shape.
        input: program input that takes it.
        fed: shape in which the input takes it, if that is another: zeros fill the ranks that a package lacks which was
            cut to fewer (:mod:`edge_runtime.package.ranks`).
    """

    name: Identifier
    shape: Shape
    input: Text
    fed: Shape | UnsetType = UNSET


class SliceSpec(Struct, frozen=True):
    """A named set of trainable tensors attached to one place of the base model.

    Attributes:
        name: name of the slice.
        kind: name of the kind of the slice (:mod:`edge_runtime.slices.kinds`), or ``head``.
        segments: indices of the segments that use it, ascending: one, or several where blocks share their weights
            (ALBERT).
        target: name of the module of the base model that it changes.
        tensors: its tensors.
    """

    name: Identifier
    kind: Identifier
    segments: Annotated[tuple[Count, ...], Meta(min_length=1)]
    target: Text
    tensors: tuple[TensorSpec, ...]

    @property
    def segment(self) -> int:
        """Index of the first segment that uses the slice; a sweep carries tangents from there on."""
        return self.segments[0]

    @property
    def dimensions(self) -> int:
        """Number of trainable scalars."""
        total = 0
        for tensor in self.tensors:
            size = 1
            for side in tensor.shape:
                size *= side
            total += size
        return total


class Segment(Struct, frozen=True):
    """A run of layers.

    Attributes:
        name: name of the segment.
        primal: program that computes the segment's outputs.
        entry: dual program for the first segment that holds a trained slice, whose incoming hidden state has no
            tangent; None for a segment that holds no slice and precedes all of them.
        dual: dual program for later segments, which takes and gives the hidden state's tangent; None as for ``entry``.
        weights: place of the frozen tensor of each initialiser.
        adjoint: program of the vector-Jacobian product, for backpropagation; None if the package has none.
        decode: program that computes the segment for new tokens from the cached keys and values of those before; None
            if the package has none.
    """

    name: Identifier
    primal: Identifier
    entry: Identifier | None
    dual: Identifier | None
    weights: dict[Text, TensorRef]
    adjoint: Identifier | None = None
    decode: Identifier | None = None


class Generation(Struct, frozen=True):
    """How decode programs give a text token by token.

    Each block takes ``past_key`` and ``past_value``, (1, heads, P, size) of the P tokens before, and gives ``key`` and
    ``value`` with the new ones. The first segment takes ``past_mask``, ones (1, P); the last gives ``logits`` (1, V).

    Attributes:
        heads: number of heads of each block that have keys and values of their own.
        key_size: numbers of a head's key.
        value_size: numbers of a head's value.
        stop_token_ids: tokens that end a text.
    """

    heads: PositiveCount
    key_size: PositiveCount
    value_size: PositiveCount
    stop_token_ids: Annotated[tuple[Count, ...], Meta(max_length=64)] = ()


class Base(Struct, frozen=True):
    """The model that the package was made from.

    Attributes:
        architecture: name of its class.
        source: name of its folder.
        parameters: number of its parameters.
        hidden_size: size H of the hidden states.
        quantisation: form in which its matrices are stored.
        causal: whether attention looks back only.
    """

    architecture: Text
    source: Text
    parameters: Count
    hidden_size: PositiveCount
    quantisation: Quantisation
    causal: bool = False


class SelfCheck(Struct, frozen=True):
    """One arithmetic compared with torch on real text, before the package was written.

    A difference is the largest absolute one, relative to the largest absolute value of torch's.

    Attributes:
        rows: number of rows of text.
        loss: difference of the rows' losses.
        jvp: difference of the directional derivatives.
        jvp_cosine: cosine between all directional derivatives and torch's.
        segments: number of segments that were run: all, or for a large package enough to use every program.
        gradient: difference of the adjoint programs' gradient; None where the package or the arithmetic has none.
        gradient_cosine: cosine between that gradient and torch's; None where there is none.
    """

    rows: Count
    loss: float
    jvp: float
    jvp_cosine: float
    segments: Count = 0
    gradient: float | None = None
    gradient_cosine: float | None = None


class QuantisationEffect(Struct, frozen=True):
    """What storing the model in few bits does to it, in torch on real text, with float arithmetic on both sides.

    Attributes:
        rows: number of rows of text.
        loss: mean over the rows of the absolute difference of the loss, relative to the float model's mean loss.
        jvp_cosine: cosine between all directional derivatives of the two models.
    """

    rows: Count
    loss: float
    jvp_cosine: float


class TopActivations(Struct, frozen=True):
    """That feed-forward parts keep each token's largest activations alone, and what that does.

    Attributes:
        kept: number of activations that are kept.
        width: number of activations of a feed-forward part.
        density: share of activations that were not zero on the rows of the self-check, a mean over all parts.
        positive: share that had been above zero before the choice.
        dense_live: largest live sets of the last block's dual program if all were kept, by arithmetic.
    """

    kept: PositiveCount
    width: PositiveCount
    density: float
    positive: float
    dense_live: dict[Arithmetic, tuple[tuple[SizeTerm, ...], ...]] = {}


class Manifest(Struct, frozen=True):
    """Everything a device needs to know of a package.

    Attributes:
        format_version: version of the package format.
        name: name of the package.
        task: task that it is trained for.
        labels: labels in the order of their indices; empty unless the task is classification.
        sequence_limit: largest number of tokens of a row.
        pad_token_id: token id of the padding.
        base: the model that it was made from.
        files: size and digest of every file, by path.
        programs: programs by name.
        segments: segments in the order in which they run.
        slices: slices, the head among them if there is one.
        tokenizer: path of the tokenizer.
        initial_state: path of the initial values of all slices.
        self_checks: comparison with torch of each arithmetic on ONNX Runtime.
        probe: path of the program that tests whether a CPU's int8 kernel saturates.
        quantisation_effect: effect of quantisation; None where it was not measured.
        executorch_checks: comparison with torch of each arithmetic on ExecuTorch.
        features: way in which the head's features are made; UNSET for what suits the attention, see
            :attr:`head_features`.
        own_labels: for ``own`` features, labels in the order of the classes that the folder's classifier has; UNSET for
            others.
        generation: how the package gives a text token by token; None if it has no decode programs.
        head_blocks: numbers of the blocks that the head reads side by side, in a run that asks for it
            (:mod:`edge_runtime.package.block_head`); UNSET in every package's file.
        head_exits: numbers of the blocks that the head may read one at a time, in a run with exits; UNSET likewise.
        mlp_topk: what of the feed-forward parts' activations is kept; UNSET for all.
    """

    format_version: PositiveCount
    name: Identifier
    task: TaskKind
    labels: Annotated[tuple[Text, ...], Meta(max_length=100_000)]
    sequence_limit: PositiveCount
    pad_token_id: Count
    base: Base
    files: dict[PackagePath, FileEntry]
    programs: dict[Identifier, Program]
    segments: Annotated[tuple[Segment, ...], Meta(min_length=2)]
    slices: tuple[SliceSpec, ...]
    tokenizer: PackagePath
    initial_state: PackagePath
    self_checks: dict[Arithmetic, SelfCheck]
    probe: PackagePath
    quantisation_effect: QuantisationEffect | None = None
    executorch_checks: dict[Arithmetic, SelfCheck] = {}
    features: Features | UnsetType = UNSET
    own_labels: Annotated[tuple[Text, ...], Meta(max_length=100_000)] | UnsetType = UNSET
    generation: Generation | None = None
    head_blocks: tuple[Count, ...] | UnsetType = UNSET
    head_exits: tuple[Count, ...] | UnsetType = UNSET
    mlp_topk: TopActivations | UnsetType = UNSET

    def slice_named(self, name: str) -> SliceSpec:
        """The slice of that name.

        Raises:
            PackageError: there is none.
        """
        for spec in self.slices:
            if spec.name == name:
                return spec
        raise PackageError(
            f"package {self.name} has no slice {name!r}; it has {', '.join(s.name for s in self.slices)}"
        )

    @property
    def segments_run(self) -> tuple[Segment, ...]:
        """The segments that run: all, or those up to the last block that a head over several blocks reads."""
        return self.segments[: self.head_blocks[-1] + 1] if self.head_blocks else self.segments

    def weights_owner(self, index: int) -> int:
        """Index of the first segment with a segment's frozen tensors: itself, or a block that shares them (ALBERT)."""
        weights = self.segments[index].weights
        if not weights:
            return index
        return next(i for i, segment in enumerate(self.segments) if segment.weights == weights)

    @property
    def engines(self) -> tuple[EngineName, ...]:
        """Engines for which every program was lowered, adjoint programs aside."""
        both = all(program.executorch for program in self._forward_programs())
        return ENGINES if both else ENGINES[:1]

    def for_engine(self, engine: EngineName) -> Manifest:
        """The package as a device with that engine sees it: only that engine's variants, and the files it needs.

        Raises:
            PackageError: the package has no programs for the engine.
        """
        if engine not in self.engines:
            raise PackageError(
                f"package {self.name} has no programs for {engine}, only for {', '.join(self.engines)}; "
                f"export it with --engine {','.join(ENGINES)}, or set the device's engine"
            )
        seen = {
            name: msgspec.structs.replace(
                program,
                variants=program.executorch if engine == "executorch" else program.variants,
                executorch={},
                packed={} if engine == "executorch" else program.packed,
            )
            for name, program in self.programs.items()
        }
        kept = {file for program in seen.values() for each in _all(program) for file in each.files}
        all_programs = {
            file for program in self.programs.values() for each in _all(program) for file in each.files
        }
        files = {
            name: entry for name, entry in self.files.items() if name in kept or name not in all_programs
        }
        checks = self.executorch_checks if engine == "executorch" else self.self_checks
        return msgspec.structs.replace(
            self, programs=seen, files=files, self_checks=checks, executorch_checks={}
        )

    @property
    def arithmetics(self) -> tuple[Arithmetic, ...]:
        """Arithmetics that every program offers, adjoint programs aside, in order of preference."""
        forward = self._forward_programs()
        return tuple(name for name in ARITHMETICS if all(name in program.variants for program in forward))

    def _forward_programs(self) -> list[Program]:
        names = {name for each in self.segments for name in (each.primal, each.entry, each.dual)}
        return [self.programs[name] for name in names if name is not None]

    @property
    def head(self) -> SliceSpec | None:
        """The classification head; None for a causal language model, whose head is frozen."""
        return next((spec for spec in self.slices if spec.kind == "head"), None)

    @property
    def head_features(self) -> Features:
        """How the head's features are made: as stated, or ``last`` where attention looks back only, else ``mean``."""
        if self.features is not UNSET:
            return self.features
        return fresh_features(self.base.causal)


def fresh_features(causal: bool) -> Features:
    """How a head's features are made where nothing states it: of the token that has seen the whole text, or of all."""
    return "last" if causal else "mean"


def parse_manifest(data: bytes) -> Manifest:
    """Parse a manifest's bytes.

    Raises:
        FormatVersionError: the package has another format; this is checked first.
        PackageError: the manifest is malformed, or names something that it does not hold.
    """
    try:
        version = msgspec.json.decode(data, type=_VersionOnly).format_version
    except MALFORMED as error:
        raise PackageError(f"malformed manifest: {error}") from error
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"package format {version} is newer than {FORMAT_VERSION}, the newest this program reads; "
            "upgrade edge-runtime or export with the older version"
        )
    if version < FORMAT_VERSION:
        raise FormatVersionError(
            f"package format {version} is older than {FORMAT_VERSION}, the only one this program reads; export it again"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except MALFORMED as error:
        raise PackageError(f"malformed manifest: {error}") from error
    _check_references(manifest)
    return manifest


class _VersionOnly(Struct):
    format_version: PositiveCount


def _all(program: Program) -> tuple[Variant, ...]:
    return (*program.variants.values(), *program.executorch.values(), *program.packed.values())


def _check_references(manifest: Manifest) -> None:
    """Check that the manifest holds whatever it names, so that nothing later meets a dangling name."""
    files = set(manifest.files)
    for name, program in manifest.programs.items():
        for variant in _all(program):
            if missing := [file for file in variant.files if file not in files]:
                raise PackageError(f"program {name} names an unlisted file {missing[0]}")
    for segment in manifest.segments:
        for program_name in (segment.primal, segment.entry, segment.dual, segment.adjoint, segment.decode):
            if program_name is not None and program_name not in manifest.programs:
                raise PackageError(f"segment {segment.name} names an unknown program {program_name}")
        for tensor in segment.weights.values():
            if tensor.file not in files:
                raise PackageError(f"segment {segment.name} names an unlisted file {tensor.file}")
    if not manifest.arithmetics:
        raise PackageError("the package's programs have no arithmetic in common; export it again")
    for path in (manifest.tokenizer, manifest.initial_state, manifest.probe):
        if path not in files:
            raise PackageError(f"the manifest names an unlisted file {path}")
    if (manifest.generation is None) != all(segment.decode is None for segment in manifest.segments) or (
        manifest.generation is not None and any(segment.decode is None for segment in manifest.segments)
    ):
        raise PackageError("every segment of a package that generates needs a decode program, and only there")
    _check_slices(manifest)


def _check_slices(manifest: Manifest) -> None:
    names = [spec.name for spec in manifest.slices]
    if len(set(names)) != len(names):
        raise PackageError("two slices of the package share a name")
    heads = sum(spec.kind == "head" for spec in manifest.slices)
    if manifest.task == "classification" and (heads != 1 or len(manifest.labels) < 2):
        raise PackageError("a classification package needs exactly one head slice, and at least two labels")
    own = () if manifest.own_labels is UNSET else manifest.own_labels
    if (manifest.features == "own") != bool(own) or (own and sorted(own) != sorted(manifest.labels)):
        raise PackageError(
            "own_labels must be the package's labels where features is own, and absent elsewhere"
        )
    if manifest.features == "max" or (manifest.head_blocks, manifest.head_exits) != (UNSET, UNSET):
        raise PackageError("a run may have a head over several blocks, a package's own reads the last one")
    if manifest.task == "causal_lm" and (heads or manifest.labels):
        raise PackageError("a package for causal language modelling has neither a head slice nor labels")
    for spec in manifest.slices:
        if spec.kind not in KINDS and spec.kind != "head":
            raise PackageError(
                f"slice {spec.name} is of the kind {spec.kind!r}, this program knows {', '.join(KINDS)}; upgrade "
                "edge-runtime, or export another kind with --slice"
            )
        if spec.segments[-1] >= len(manifest.segments) or list(spec.segments) != sorted(set(spec.segments)):
            raise PackageError(
                f"slice {spec.name} names segments {spec.segments} of {len(manifest.segments)}; "
                "they must exist and ascend"
            )
