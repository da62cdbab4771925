"""Build a package: the exporter's main flow, :func:`export_package`, readable top to bottom."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx_ir as ir
from torch import Tensor

from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.engines.choice import engine_version
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SIGNATURE,
    Arithmetic,
    Base,
    FileEntry,
    Manifest,
    Program,
    Quantisation,
    Segment,
    SliceSpec,
    TaskKind,
    TensorRef,
    TensorSpec,
    Variant,
)
from edge_runtime.package.package import Package, sha256_of
from edge_runtime.package.slices import FloatArray, Values, encode_values, key
from edge_runtime.protocol.signing import PrivateKey
from export.adapter import whole_factor
from export.arithmetic import has_frozen_products, probe, with_arithmetic
from export.capture import SegmentGraph, structure_of
from export.heads import HEAD
from export.lower_onnx import lower
from export.model import LoadedModel, load_model
from export.model_folder import check_model_folder, read_config
from export.predict import live_sets, peak_tensors
from export.program import ProgramKind, TracedProgram, trace
from export.read_adapter import Adapter, Wanted, read_adapter
from export.reference import TorchReference
from export.schedule import REFERENCE, order_for_memory
from export.self_check import (
    COSINE_LIMIT,
    check_package,
    chosen_segments,
    draw_sample,
    measure_effect,
    shortened,
)
from export.slices import FACTORS, SliceKind, SliceOptions
from export.start_values import start_values
from export.stored import StoredModel, WrittenTensors, store
from export.tokenizer import write_tokenizer

#: Segments start on a page, tensors on a cache line.
PAGE_BYTES = 4096
TENSOR_ALIGNMENT_BYTES = 64
TOKENIZER = "tokenizer.json"
STATE = "slices.safetensors"
PROBE = "programs/probe.onnx"
#: Which arithmetics a package can offer, by how its weights are stored.
OFFERED: dict[Quantisation, tuple[Arithmetic, ...]] = {
    "int8": ("row_int8", "block_int8", "float"),
    "int4": ("row_int8", "block_int4", "float"),
    "none": ("float",),
}
#: Those in which a frozen product can be read transposed.
ADJOINT_ARITHMETICS: tuple[Arithmetic, ...] = ("row_int8", "float")
BAR_WIDTH = 20
#: Tensors of a program's largest live set that the manifest names.
PEAK_TENSORS = 8

Progress = Callable[[str], None]
DtypeName = Literal["float32", "uint8", "int64", "bool"]


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        model: Hugging Face folder. labels: the label set, in order; none for a causal language model.
        output: folder to create. slices: which slices.
        sequence_limit: longest sequence the package will train, in tokens.
        quantisation: of frozen matrices; ``none`` keeps float32 for comparison.
        check_texts: real text for the self-check, at least one. task: what the model is trained for.
        adapter: ``peft`` adapter folder that the slices start from; rank and targets are its own, for ``lora`` the
            scale too.
        trust_remote_code: whether Python code of the model folder's own may run.
        with_adjoint: also write the adjoint programs that backpropagation runs.
        engines: what devices may run the package on; ONNX Runtime is always among them.
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


def export_package(options: ExportOptions, signer: PrivateKey, progress: Progress) -> Package:
    """Write a package, or nothing.

    Args:
        options: what to export.
        signer: key that signs the manifest.
        progress: called with a sentence as each stage begins.

    Returns:
        The opened package.

    Raises:
        ConfigError: an engine is not installed; gives the install command.
        ModelError: the model cannot be exported, or the programs disagree with torch.
    """
    for engine in options.engines:
        engine_version(engine)  # refuses what is not installed
    if options.output.exists():
        raise ModelError(f"{options.output} exists already; choose another --output or remove it")
    check_model_folder(options.model, options.labels, trust_remote_code=options.trust_remote_code)

    # 1. Build the model without its weights and attach slices.
    progress(f"Loading {options.model.name} and attaching {options.slices.kind} slices")
    adapter = None if options.adapter is None else _read_adapter(options, options.adapter)
    slices = options.slices if adapter is None else adapter.slice_options(options.slices)
    model = load_model(
        options.model,
        len(options.labels),
        slices,
        options.task,
        trust_remote_code=options.trust_remote_code,
    )
    sequence_limit = min(options.sequence_limit, model.position_limit)

    # 2. Capture as one graph, cut into segments, quantise frozen matrices: all of it on shapes alone.
    progress("Capturing the model and cutting it into segments")
    stored = store(model, options.quantisation)

    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".export-") as temporary:
        folder = Path(temporary) / "package"
        (folder / "programs").mkdir(parents=True)
        (folder / "weights").mkdir()

        # 3. Write slices and tokenizer: what is wrong with them is told before the long part begins.
        specs = _slice_specs(stored, options.slices.kind)
        (folder / STATE).write_bytes(encode_values(_initial_values(stored, specs, adapter)))
        pad_token_id, note = write_tokenizer(
            options.model, folder / TOKENIZER, trust_remote_code=options.trust_remote_code
        )
        if note is not None:
            progress(note)

        # 4. Trace and lower each distinct structure once.
        programs, names = _write_programs(
            folder,
            stored,
            model.position_limit,
            OFFERED[options.quantisation],
            options.with_adjoint,
            progress,
            sequence_limit if "executorch" in options.engines else None,
        )
        ir.save(probe(), folder / PROBE)

        # 5. Write weights, one matrix at a time.
        manifest_segments = _write_segments(folder, stored, names, progress)

        # 6. Compare with torch on real text, then describe and sign.
        manifest = _describe(
            options, model, sequence_limit, pad_token_id, folder, programs, manifest_segments, specs
        )
        chosen = chosen_segments(manifest)
        progress(
            "Comparing the programs with torch on real text"
            + (f", over {len(chosen) - 2} of the blocks" if len(chosen) < len(manifest.segments) else "")
        )
        compared = shortened(Package(folder, manifest, ""), chosen)
        reference = _reference(folder, stored, manifest, chosen)
        sample = draw_sample(compared, reference, options.check_texts)
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
        data = msgspec.json.encode(manifest, order="sorted")
        write_durably(folder / MANIFEST, data)
        write_durably(folder / SIGNATURE, signer.sign(data).encode())
        rename_durably(folder, options.output)
    return Package.open(options.output, signer.public_key)


def _describe(
    options: ExportOptions,
    model: LoadedModel,
    sequence_limit: int,
    pad_token_id: int,
    folder: Path,
    programs: dict[str, Program],
    segments: tuple[Segment, ...],
    slices: tuple[SliceSpec, ...],
) -> Manifest:
    """The manifest, without self-checks."""
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
    )


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
    used = {variant.file for program in programs.values() for variant in program.variants.values()}
    for program in manifest.programs.values():
        for variant in program.variants.values():
            if variant.file not in used:
                (folder / variant.file).unlink(missing_ok=True)
    checks = {name: check for name, check in manifest.self_checks.items() if name in good}
    return msgspec.structs.replace(manifest, programs=programs, self_checks=checks, files=_list_files(folder))


def _kinds(segment: SegmentGraph, with_adjoint: bool, behind_slices: bool) -> tuple[ProgramKind, ...]:
    """The programs a segment needs; ``behind_slices``: one of its own or of a segment before it may carry tangents."""
    if not segment.slices and not behind_slices:
        return ("primal",)
    enters = bool(segment.slices) and segment.name != HEAD
    forward: tuple[ProgramKind, ...] = ("primal", "entry", "dual") if enters else ("primal", "dual")
    return (*forward, "adjoint") if with_adjoint else forward


def _write_programs(
    folder: Path,
    stored: StoredModel,
    position_limit: int,
    arithmetics: tuple[Arithmetic, ...],
    with_adjoint: bool,
    progress: Progress,
    executorch_limit: int | None,
) -> tuple[dict[str, Program], list[dict[ProgramKind, str]]]:
    """Trace and lower; returns programs by name, and for each segment the names of its programs by kind.

    ``executorch_limit`` is the longest sequence of ExecuTorch's programs; None writes none.
    """
    programs: dict[str, Program] = {}
    by_structure: dict[object, dict[ProgramKind, str]] = {}
    names = []
    behind_slices = False
    for segment in stored.segments:
        behind_slices = behind_slices or bool(segment.slices)
        structure = (structure_of(segment, stored.shapes), behind_slices)
        if structure not in by_structure:
            made: dict[ProgramKind, str] = {}
            for kind in _kinds(segment, with_adjoint, behind_slices):
                name = f"{segment.name}.{kind}"
                progress(f"Lowering {name}")
                traced = trace(segment, kind, stored.shapes, position_limit)
                flowing = tuple(n for n in traced.inputs if n not in segment.weights)
                limit = executorch_limit if kind != "adjoint" else None
                executorch = _write_executorch(folder, name, traced, limit)
                lowered = lower(traced)  # rewrites what was traced
                order_for_memory(lowered)  # arithmetics replace nodes where they stand
                offered = tuple(a for a in arithmetics if kind != "adjoint" or a in ADJOINT_ARITHMETICS)
                variants = _write_variants(folder, name, lowered, flowing, offered)
                programs[name] = Program(flowing, traced.outputs, variants, executorch)
                made[kind] = name
            by_structure[structure] = made
        names.append(by_structure[structure])
    return programs, names


def _write_executorch(
    folder: Path, name: str, traced: TracedProgram, sequence_limit: int | None
) -> dict[Arithmetic, Variant]:
    if sequence_limit is None:
        return {}
    from export.write_executorch import write_executorch  # noqa: PLC0415 - an extra, loaded where it is asked for

    return {"float": write_executorch(folder, name, traced, sequence_limit)}


def _write_variants(
    folder: Path, name: str, model: ir.Model, flowing: tuple[str, ...], arithmetics: tuple[Arithmetic, ...]
) -> dict[Arithmetic, Variant]:
    """Write a lowered program in each arithmetic; once, where they do not differ."""
    if not has_frozen_products(model):
        return dict.fromkeys(arithmetics, _write_variant(folder, name, model, flowing))
    return {
        arithmetic: _write_variant(
            folder, f"{name}.{arithmetic}", with_arithmetic(model, arithmetic), flowing
        )
        for arithmetic in arithmetics
    }


def _write_variant(folder: Path, name: str, model: ir.Model, flowing: tuple[str, ...]) -> Variant:
    file = f"programs/{name}.onnx"
    ir.save(model, folder / file)
    return Variant(
        file=file,
        fed=tuple(str(value.name) for value in model.graph.inputs if value.name not in flowing),
        bound=tuple(
            str(value.name)
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        ),
        gathered=dict(_gathered_rows(model)),
        live=live_sets(model),
        peak_tensors=peak_tensors(model, REFERENCE[0], PEAK_TENSORS),
    )


def _gathered_rows(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Tables of which a program reads only the rows that one of its inputs names: (table, input)."""
    tables = {"GatherBlockQuantized": (0, 2), "Gather": (0,)}
    for node in model.graph:
        if node.op_type not in tables:
            continue
        rows = node.inputs[1]
        for position in tables[node.op_type]:
            table = node.inputs[position]
            if table is None or rows is None:
                continue
            if table in model.graph.inputs and rows in model.graph.inputs and len(table.uses()) == 1:
                yield str(table.name), str(rows.name)


def _write_segments(
    folder: Path,
    stored: StoredModel,
    names: list[dict[ProgramKind, str]],
    progress: Progress,
) -> tuple[Segment, ...]:
    """Write all frozen tensors; segments that share them, as blocks of ALBERT do, share one file."""
    written: dict[tuple[str, ...], dict[str, TensorRef]] = {}
    segments = []
    for index, segment in enumerate(stored.segments):
        sources = tuple(segment.weights.values())
        if sources not in written:
            progress(_bar(index, len(stored.segments)) + f" Writing weights of {segment.name}")
            written[sources] = _write_weights(folder, segment, stored.tensors)
        made = names[index]
        segments.append(
            Segment(
                segment.name,
                made["primal"],
                made.get("entry"),
                made.get("dual"),
                weights=written[sources],
                adjoint=made.get("adjoint"),
            )
        )
    return tuple(segments)


def _bar(done: int, count: int) -> str:
    filled = BAR_WIDTH * done // count
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{count}"


def _write_weights(
    folder: Path, segment: SegmentGraph, tensors: Mapping[str, Tensor]
) -> dict[str, TensorRef]:
    """Write one segment's frozen tensors to one file, each made, written and forgotten."""
    if not segment.weights:
        return {}
    file = f"weights/{segment.name}.bin"
    references = {}
    with (folder / file).open("wb") as out:
        for name, source in segment.weights.items():
            array = tensors[source].contiguous().numpy()  # ascontiguousarray would give a scalar an axis
            out.write(b"\0" * (-out.tell() % TENSOR_ALIGNMENT_BYTES))
            references[name] = TensorRef(file, out.tell(), _dtype_name(array), array.shape)
            array.tofile(out)
        out.write(b"\0" * (-out.tell() % PAGE_BYTES))
    return references


def _dtype_name(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> DtypeName:
    names: dict[str, DtypeName] = {"float32": "float32", "uint8": "uint8", "int64": "int64", "bool": "bool"}
    if array.dtype.name not in names:
        raise ModelError(
            f"the model holds a frozen {array.dtype.name} tensor; packages carry {', '.join(names)}"
        )
    return names[array.dtype.name]


def _flat_name(source: str) -> tuple[str, str]:
    """Slice and tensor name of a trainable parameter of the classifier."""
    slice_name, tensor = source.rsplit(".", 1)
    return slice_name.removeprefix("encoder."), tensor


def _slice_specs(stored: StoredModel, kind: SliceKind) -> tuple[SliceSpec, ...]:
    tensors: dict[str, dict[str, TensorSpec]] = {}
    segments: dict[str, list[int]] = {}
    for index, segment in enumerate(stored.segments):
        for placeholder, source in segment.slices.items():
            name, tensor = _flat_name(source)
            shape = tuple(stored.shapes[source].shape)
            tensors.setdefault(name, {})[tensor] = TensorSpec(tensor, shape, placeholder)
            segments.setdefault(name, []).append(index)
    specs = []
    for name, parts in tensors.items():
        chosen: SliceKind | Literal["head"] = "head" if name == HEAD else kind
        used = tuple(sorted(set(segments[name])))
        specs.append(SliceSpec(name, chosen, used, target=name, tensors=tuple(parts.values())))
    return tuple(specs)


def _read_adapter(options: ExportOptions, folder: Path) -> Adapter:
    architecture = str(read_config(options.model).get("model_type"))
    return read_adapter(folder, Wanted(architecture, options.task, options.labels))


def _initial_values(stored: StoredModel, specs: tuple[SliceSpec, ...], adapter: Adapter | None) -> Values:
    sources = [source for segment in stored.segments for source in segment.slices.values()]
    values = {key(*_flat_name(source)): stored.tensors[source].numpy() for source in sources}
    if adapter is None:
        return values

    def frozen(spec: SliceSpec) -> tuple[FloatArray, FloatArray]:
        up, down = (whole_factor(stored.tensors, f"encoder.{spec.target}.{name}", ".") for name in FACTORS)
        return up.numpy(), down.numpy()

    return values | start_values(adapter, specs, frozen)


def _list_files(folder: Path) -> dict[str, FileEntry]:
    return {
        str(path.relative_to(folder)): FileEntry(path.stat().st_size, sha256_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("-.") or "model"
