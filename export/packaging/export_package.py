"""Build a package: the exporter's main flow, :func:`export_package`, readable top to bottom."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import onnx_ir as ir
from msgspec import UNSET, UnsetType

from edge_runtime.data.batches import Batch, Row, Tokenizer
from edge_runtime.data.rows import NO_LABEL
from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SIGNATURE,
    Arithmetic,
    Base,
    Features,
    FileEntry,
    Generation,
    Manifest,
    Program,
    Quantisation,
    Segment,
    SizeTerm,
    SliceSpec,
    TaskKind,
    TensorRef,
    TensorSpec,
    TopActivations,
    fresh_features,
)
from edge_runtime.package.package import Package, sha256_of
from edge_runtime.package.slices import FloatArray, Values, encode_values, key
from edge_runtime.protocol.signing import PrivateKey
from export.adapters.peft_names import FEATURES, HEAD_DESCRIBED, HEAD_TENSORS
from export.adapters.read import Adapter, Wanted, read_adapter
from export.adapters.saved_head import folder_with_head, order_of_classes
from export.adapters.start_values import start_values
from export.adapters.write import whole_factor
from export.lowering.arithmetic import probe
from export.model.folder import read_config
from export.model.generation import stop_tokens
from export.model.heads import HEAD
from export.model.json_file import read_json_object
from export.model.load import LoadedModel, load_model
from export.model.own_head import UnusableHead
from export.model.slices import slice_and_tensor
from export.model.top_activations import place
from export.packaging.activation_density import activation_density
from export.packaging.early_checks import check_early
from export.packaging.head_start import HeadStart
from export.packaging.input_moments import input_moments
from export.packaging.library_check import LibraryModel, check_against_library
from export.packaging.mask_scores import MaskRule, Scoring, score
from export.packaging.programs import OFFERED, ProgramOptions, Progress, dual_live_sets, write_programs
from export.packaging.self_check import (
    COSINE_LIMIT,
    check_package,
    chosen_segments,
    draw_batch,
    draw_sample,
    measure_effect,
    shortened,
    torch_inputs,
)
from export.packaging.tokenizer import write_tokenizer
from export.packaging.torch_reference import TorchReference
from export.packaging.weights import write_segments
from export.quantisation.stored import StoredModel, WrittenTensors, store
from export.slices.sliced_linear import SliceOptions

#: What LoRA-XS's factors are made of: the weight alone, or what enters the layer too.
Factors = Literal["weight", "inputs"]
TOKENIZER = "tokenizer.json"
STATE = "slices.safetensors"
PROBE = "programs/probe.onnx"
#: Texts on which a folder's own classifier is compared with the library's.
HEAD_CHECK_ROWS = 8


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        model: Hugging Face model folder.
        labels: label set, in order; empty for a causal language model.
        output: folder to create.
        slices: slices to attach.
        sequence_limit: longest sequence the package will train, in tokens.
        quantisation: format of frozen matrices; ``none`` keeps float32 for comparison.
        check_texts: real text for the self-check, at least one.
        task: what the model is trained for.
        adapter: ``peft`` adapter folder that the slices start from; its rank and targets replace those of ``slices``,
            for ``lora`` its scale too.
        trust_remote_code: whether Python code of the model folder's own may run.
        with_adjoint: whether to write the adjoint programs that backpropagation runs, too.
        engines: engines that devices may run the package on; ONNX Runtime is always among them.
        with_generation: whether to write the programs that give a text token by token, too.
        mask: how a sparse slice's entries are chosen (:mod:`export.packaging.mask_scores`); other kinds pass over it.
        factors: what LoRA-XS's factors are made of: ``weight`` alone, or what enters the layers too
            (:mod:`export.packaging.input_moments`); other kinds pass over it.
        check_labels: label index of each of ``check_texts``, which a mask may learn from; empty if they have none.
        mlp_topk: how many activations of each feed-forward part are kept (:mod:`export.model.top_activations`); None
            for all. Masks and moments are made of the model with all.
    """

    model: Path
    labels: tuple[str, ...]
    output: Path
    slices: SliceOptions
    sequence_limit: int
    quantisation: Quantisation
    check_texts: tuple[str, ...]
    task: TaskKind = "classification"
    adapter: Path | None = None
    trust_remote_code: bool = False
    with_adjoint: bool = False
    engines: tuple[EngineName, ...] = ("onnxruntime",)
    with_generation: bool = False
    mask: MaskRule = "movement"
    factors: Factors = "weight"
    check_labels: tuple[int, ...] = ()
    mlp_topk: int | None = None


def export_package(
    options: ExportOptions, signer: PrivateKey, progress: Progress, note: Progress | None = None
) -> Package:
    """Write a package, or nothing.

    Args:
        options: what to export.
        signer: key that signs the manifest.
        progress: called with a sentence as each stage begins.
        note: called with each sentence about what is not used of the folder, or used otherwise than its files say; None
            to hand them to ``progress``.

    Returns:
        The opened package.

    Raises:
        ConfigError: an engine is not installed; gives the install command.
        ModelError: the model cannot be exported, it disagrees with the one that transformers loads, or the programs
            disagree with torch.
    """
    with ExitStack() as kept:
        return _export(options, signer, progress, note or progress, kept)


def _export(
    options: ExportOptions, signer: PrivateKey, progress: Progress, note: Progress, kept: ExitStack
) -> Package:
    """Write a package; folders in ``kept`` are there until it is written."""
    trusted = options.trust_remote_code
    for sentence in check_early(
        options.model, options.labels, options.output, options.engines, trust_remote_code=trusted
    ):
        note(sentence)

    # 1. Build the model without its weights and attach slices.
    progress(f"Loading {options.model.name} and attaching {options.slices.kind} slices")
    adapter = None if options.adapter is None else _read_adapter(options, options.adapter)
    if adapter is not None:
        for left_out in adapter.notes:
            progress(left_out)
    slices = options.slices if adapter is None else adapter.slice_options(options.slices)
    slices = _with_what_rows_say(options, slices, progress)
    start = _head_start(options, slices, adapter, progress, kept)
    model = start.load()
    sequence_limit = min(options.sequence_limit, model.position_limit)
    for sentence in (*model.notes, *_cut_note(options, sequence_limit)):
        note(sentence)

    # 2. Capture as one graph, cut into segments, quantise frozen matrices: all of it on shapes alone.
    progress("Capturing the model and cutting it into segments")
    generates = options.with_generation and options.mlp_topk is None
    stored = store(model, options.quantisation, with_generation=generates)

    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".export-") as temporary:
        folder = Path(temporary) / "package"
        (folder / "programs").mkdir(parents=True)
        (folder / "weights").mkdir()

        # 3. Write tokenizer and slices: what is wrong with them is told before the long part begins.
        pad_token_id, stand_in = write_tokenizer(
            options.model, folder / TOKENIZER, model.vocabulary, trust_remote_code=trusted
        )
        if stand_in is not None:
            note(stand_in)
        texts = [Row(text, NO_LABEL) for text in options.check_texts[:HEAD_CHECK_ROWS]]
        ids = Tokenizer(folder / TOKENIZER, sequence_limit).encode(texts)
        model, stored = start.settle(model, stored, options.quantisation, ids, progress)
        batch = _check_batch(options, folder, sequence_limit, pad_token_id)
        if model.classifier is None:  # with its own classifier the folder was just compared as a whole
            progress(f"Comparing the model with the one that transformers loads, on {_described(batch)}")
            library = LibraryModel.of(options.model, model, trust_remote_code=trusted)
            check_against_library(library, stored, batch)
        chosen_programs = _chosen_programs(options, model, sequence_limit)
        # What was compared so far keeps all activations, as transformers does.
        dense_live = dual_live_sets(stored, chosen_programs) if options.mlp_topk is not None else {}
        if options.mlp_topk is not None:
            model, stored = _with_top_activations(options, options.mlp_topk, start, model, progress)
        specs = _slice_specs(stored, options.slices.kind, model.classifier)
        _check_adapters_head(options, model)
        (folder / STATE).write_bytes(encode_values(_initial_values(stored, specs, adapter)))

        # 4. Trace and lower each distinct structure once.
        programs, names = write_programs(folder, stored, chosen_programs, progress)
        ir.save(probe(), folder / PROBE)

        # 5. Write weights, one matrix at a time.
        manifest_segments = write_segments(folder, stored, names, progress)

        # 6. Compare with torch on real text, then describe and sign.
        manifest = _describe(
            options,
            model,
            folder,
            sequence_limit=sequence_limit,
            pad_token_id=pad_token_id,
            programs=programs,
            segments=manifest_segments,
            slices=specs,
            generation=_generation(options, model, stored),
        )
        manifest = _checked(options, folder, stored, manifest, batch, progress)
        if options.mlp_topk is not None:
            manifest = _with_density(options.mlp_topk, folder, stored, manifest, batch, dense_live)
        _write_signed(folder, manifest, signer)
        rename_durably(folder, options.output)
    return Package.open(options.output, signer.public_key)


def _checked(
    options: ExportOptions,
    folder: Path,
    stored: StoredModel,
    manifest: Manifest,
    batch: Batch,
    progress: Progress,
) -> Manifest:
    """The manifest with what the self-check found, without arithmetics that it found poor."""
    chosen = chosen_segments(manifest)
    progress(
        f"Comparing the programs with torch on {_described(batch)}"
        + (f", over {len(chosen) - 2} of the blocks" if len(chosen) < len(manifest.segments) else "")
    )
    compared = shortened(Package(folder, manifest, ""), chosen)
    reference = _reference(folder, stored, manifest, chosen)
    sample = draw_sample(compared, reference, batch)
    checks = check_package(compared, reference, sample)
    if "executorch" in options.engines:
        on_executorch = check_package(compared, reference, sample, "executorch")
        manifest = msgspec.structs.replace(manifest, executorch_checks=on_executorch)
    manifest = _without_poor_arithmetics(msgspec.structs.replace(manifest, self_checks=checks), folder)
    if options.quantisation != "none":
        progress("Comparing the quantised weights with the model's own")
        plain = TorchReference(tuple(stored.plain[index] for index in chosen), stored.tensors)
        effect = measure_effect(plain, reference, sample)
        manifest = msgspec.structs.replace(manifest, quantisation_effect=effect)
    return manifest


def _chosen_programs(options: ExportOptions, model: LoadedModel, sequence_limit: int) -> ProgramOptions:
    return ProgramOptions(
        position_limit=model.position_limit,
        arithmetics=OFFERED[options.quantisation],
        with_adjoint=options.with_adjoint,
        executorch_limit=sequence_limit if "executorch" in options.engines else None,
    )


def _with_top_activations(
    options: ExportOptions, kept: int, start: HeadStart, model: LoadedModel, progress: Progress
) -> tuple[LoadedModel, StoredModel]:
    """The model once more, whose feed-forward parts keep their largest activations."""
    progress(f"Capturing the model once more, with {kept} activations kept of each feed-forward part")
    model = start.again(model, kept)
    return model, store(model, options.quantisation, with_generation=options.with_generation)


def _with_density(
    kept: int,
    folder: Path,
    stored: StoredModel,
    manifest: Manifest,
    batch: Batch,
    dense_live: dict[Arithmetic, tuple[tuple[SizeTerm, ...], ...]],
) -> Manifest:
    """The manifest with what keeping the largest activations does to the check rows and to memory."""
    reference = _reference(folder, stored, manifest, chosen_segments(manifest))
    density, positive = activation_density(reference, torch_inputs(batch))
    (width,) = {int(node.args[2]) for node in stored.segments[-2].graph.nodes if node.target is place}
    live = {name: sets for name, sets in dense_live.items() if name in manifest.self_checks}
    top = TopActivations(kept, width, density, positive, live)
    return msgspec.structs.replace(manifest, mlp_topk=top)


def _write_signed(folder: Path, manifest: Manifest, signer: PrivateKey) -> None:
    data = msgspec.json.encode(manifest, order="sorted")
    write_durably(folder / MANIFEST, data)
    write_durably(folder / SIGNATURE, signer.sign(data).encode())


def _with_what_rows_say(options: ExportOptions, slices: SliceOptions, progress: Progress) -> SliceOptions:
    """The options with scores of entries, or moments of inputs, if slices are to be made by the check rows."""
    if slices.kind == "lora_xs" and options.factors == "inputs":
        return replace(slices, moments=input_moments(_scoring(options, slices), progress))
    if slices.kind == "sparse" and options.mask != "random":
        return replace(slices, scores=score(_scoring(options, slices), options.mask, progress))
    return slices


def _scoring(options: ExportOptions, slices: SliceOptions) -> Scoring:
    labels = options.check_labels or (NO_LABEL,) * len(options.check_texts)
    return Scoring(
        model=options.model,
        task=options.task,
        classes=len(options.labels),
        rows=tuple(Row(text, label) for text, label in zip(options.check_texts, labels, strict=True)),
        sequence_limit=options.sequence_limit,
        targets=slices.targets,
        seed=slices.seed,
        trust_remote_code=options.trust_remote_code,
    )


def _head_start(
    options: ExportOptions,
    slices: SliceOptions,
    adapter: Adapter | None,
    progress: Progress,
    kept: ExitStack,
) -> HeadStart:
    """What the head starts from: an adapter's classifier if there is one that can, else what the folder has."""
    folder, brought = options.model, None
    if options.labels and adapter is not None and adapter.saved_head is not None and adapter.head is None:
        order, said = order_of_classes(folder, options.labels)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".export-head-")
        try:
            folder = folder_with_head(
                folder, adapter.saved_head, order, Path(kept.enter_context(made)) / folder.name
            )
            brought = f"Training goes on from the adapter's classifier{said}"
        except UnusableHead as reason:
            progress(f"The adapter's classifier is not used: {reason}")
    load = partial(
        load_model,
        folder,
        len(options.labels),
        slices,
        options.task,
        trust_remote_code=options.trust_remote_code,
    )
    trusted = options.trust_remote_code
    return HeadStart(folder, options.labels, load, trust_remote_code=trusted, brought=brought)


def _check_adapters_head(options: ExportOptions, model: LoadedModel) -> None:
    """An adapter's head must have been trained on features that are made as this package makes them."""
    if options.adapter is None or model.features is None or not (options.adapter / HEAD_DESCRIBED).is_file():
        return
    theirs = read_json_object(options.adapter / HEAD_DESCRIBED).get("features")
    if theirs != FEATURES.get(model.features):
        raise ModelError(
            f"{options.adapter / HEAD_DESCRIBED} is for a head on other features ({str(theirs)[:90]}) than those of a "
            f"package of {options.model}; remove {HEAD_TENSORS} and {HEAD_DESCRIBED} to start without that head"
        )


def _check_batch(options: ExportOptions, folder: Path, sequence_limit: int, pad_token_id: int) -> Batch:
    """The texts that the checks run on."""
    return draw_batch(
        folder / TOKENIZER,
        options.check_texts,
        labels=len(options.labels),
        sequence_limit=sequence_limit,
        pad_token_id=pad_token_id,
    )


def _cut_note(options: ExportOptions, sequence_limit: int) -> tuple[str, ...]:
    """A sentence if texts are cut at fewer tokens than was asked for."""
    if sequence_limit == options.sequence_limit:
        return ()
    return (f"Texts are cut at {sequence_limit} tokens, as many as the model has positions for",)


def _described(batch: Batch) -> str:
    rows, longest = batch.attention_mask.shape[0], int(batch.attention_mask.sum(axis=1).max())
    return f"{rows} rows of real text of up to {longest} tokens"


def _describe(
    options: ExportOptions,
    model: LoadedModel,
    folder: Path,
    *,
    sequence_limit: int,
    pad_token_id: int,
    programs: dict[str, Program],
    segments: tuple[Segment, ...],
    slices: tuple[SliceSpec, ...],
    generation: Generation | None,
) -> Manifest:
    """The manifest of the files in ``folder``, without self-checks."""
    return Manifest(
        format_version=FORMAT_VERSION,
        name=_safe_name(options.model.name),
        task=options.task,
        labels=options.labels,
        sequence_limit=sequence_limit,
        pad_token_id=pad_token_id,
        base=Base(
            architecture=model.architecture,
            source=options.model.name,
            parameters=model.parameters,
            hidden_size=model.hidden_size,
            quantisation=options.quantisation,
            causal=model.causal,
        ),
        files=_list_files(folder),
        programs=programs,
        segments=segments,
        slices=slices,
        tokenizer=TOKENIZER,
        initial_state=STATE,
        self_checks={},
        probe=PROBE,
        features=_stated(model),
        own_labels=_in_order_of_classes(options.labels, model.rows),
        generation=generation,
    )


def _generation(options: ExportOptions, model: LoadedModel, stored: StoredModel) -> Generation | None:
    """How decode programs are used; None where there are none."""
    shape = stored.cache_shape
    if shape is None:
        return None
    stops = stop_tokens(options.model, model.vocabulary)
    return Generation(shape.heads, shape.key_size, shape.value_size, stops)


def _in_order_of_classes(labels: tuple[str, ...], rows: tuple[int, ...]) -> tuple[str, ...] | UnsetType:
    """Labels in the order of the classes of the folder's own classifier; UNSET for a fresh head."""
    return tuple(labels[rows.index(index)] for index in range(len(rows))) if rows else UNSET


def _stated(model: LoadedModel) -> Features | UnsetType:
    """How features are made, where a reader could not tell it from the attention."""
    if model.features is None or model.features == fresh_features(model.causal):
        return UNSET
    return model.features


def _reference(
    folder: Path, stored: StoredModel, manifest: Manifest, chosen: tuple[int, ...]
) -> TorchReference:
    """The chosen segments in torch, on the weights as they were written."""
    references: dict[str, TensorRef] = {}
    for index in chosen:
        graph, written = stored.segments[index], manifest.segments[index].weights
        references.update({source: written[name] for name, source in graph.weights.items()})
    segments = tuple(stored.segments[index] for index in chosen)
    return TorchReference(segments, WrittenTensors(folder, references, stored.tensors))


def _without_poor_arithmetics(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest, and the folder, without arithmetics whose jvps point elsewhere on this model."""
    good = {name for name, check in manifest.self_checks.items() if check.jvp_cosine > COSINE_LIMIT}
    programs = {
        name: msgspec.structs.replace(
            program, variants={a: variant for a, variant in program.variants.items() if a in good}
        )
        for name, program in manifest.programs.items()
    }
    used = {
        file for program in programs.values() for each in program.variants.values() for file in each.files
    }
    for program in manifest.programs.values():
        for variant in program.variants.values():
            for file in set(variant.files) - used:
                (folder / file).unlink(missing_ok=True)
    checks = {name: check for name, check in manifest.self_checks.items() if name in good}
    return msgspec.structs.replace(manifest, programs=programs, self_checks=checks, files=_list_files(folder))


def _slice_specs(stored: StoredModel, kind: str, classifier: str | None = None) -> tuple[SliceSpec, ...]:
    """Slices of the captured model; the head's target is the folder's own classifier if it goes on from that."""
    tensors: dict[str, dict[str, TensorSpec]] = {}
    segments: dict[str, list[int]] = {}
    for index, segment in enumerate(stored.segments):
        for placeholder, source in segment.slices.items():
            name, tensor = slice_and_tensor(source)
            shape = tuple(stored.shapes[source].shape)
            tensors.setdefault(name, {})[tensor] = TensorSpec(tensor, shape, placeholder)
            segments.setdefault(name, []).append(index)
    specs = []
    for name, parts in tensors.items():
        used = tuple(sorted(set(segments[name])))
        target = classifier if name == HEAD and classifier is not None else name
        chosen = "head" if name == HEAD else kind
        specs.append(SliceSpec(name, chosen, used, target=target, tensors=tuple(parts.values())))
    return tuple(specs)


def _read_adapter(options: ExportOptions, folder: Path) -> Adapter:
    architecture = str(read_config(options.model).get("model_type"))
    return read_adapter(folder, Wanted(options.model, architecture, options.task, options.labels))


def _initial_values(stored: StoredModel, specs: tuple[SliceSpec, ...], adapter: Adapter | None) -> Values:
    sources = [source for segment in stored.segments for source in segment.slices.values()]
    values = {key(*slice_and_tensor(source)): stored.tensors[source].numpy() for source in sources}
    if adapter is None:
        return values

    def frozen(spec: SliceSpec, name: str) -> FloatArray:
        return whole_factor(stored.tensors, f"encoder.{spec.target}.{name}", ".").numpy()

    return values | start_values(adapter, specs, frozen)


def _list_files(folder: Path) -> dict[str, FileEntry]:
    return {
        str(path.relative_to(folder)): FileEntry(path.stat().st_size, sha256_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("-.") or "model"
