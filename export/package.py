"""Build a package: the exporter's main flow, :func:`export_package`, readable top to bottom."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx_ir as ir
from torch import Tensor
from transformers import AutoTokenizer

from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.errors import ConfigError, ModelError
from edge_runtime.package import (
    FORMAT_VERSION,
    MANIFEST,
    SIGNATURE,
    Arithmetic,
    Base,
    EngineName,
    FileEntry,
    Manifest,
    Package,
    Program,
    Segment,
    SliceSpec,
    TensorRef,
    TensorSpec,
    Variant,
    sha256_of,
)
from edge_runtime.signing import PrivateKey
from edge_runtime.slices import encode_values, key
from export.arithmetic import has_frozen_products, probe, with_arithmetic
from export.capture import SegmentGraph, capture, structure_of
from export.lower_onnx import lower
from export.model import HEAD, SliceKind, SliceOptions, load_model
from export.predict import live_sets, peak_tensors
from export.program import ProgramKind, TracedProgram, trace
from export.quantise_graph import quantise_capture
from export.reference import TorchReference
from export.schedule import REFERENCE, order_for_memory
from export.self_check import COSINE_LIMIT, check_package

#: Segments start on a page, tensors on a cache line.
PAGE_BYTES = 4096
TENSOR_ALIGNMENT_BYTES = 64
TOKENIZER = "tokenizer.json"
STATE = "slices.safetensors"
PROBE = "programs/probe.onnx"
#: Which arithmetics a package can offer, by how its weights are stored.
OFFERED: dict[str, tuple[Arithmetic, ...]] = {"int8": ("row_int8", "block_int8", "float"), "none": ("float",)}
#: Tensors of a program's largest live set that the manifest names.
PEAK_TENSORS = 8

Progress = Callable[[str], None]
DtypeName = Literal["float32", "uint8", "int64", "bool"]


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        model: Hugging Face folder. labels: the label set, in order. output: folder to create.
        slices: which slices. sequence_limit: longest sequence the package will train, in tokens.
        quantisation: ``int8``, or ``none`` to keep float32 for comparison.
        check_texts: real text for the self-check, at least one.
        engines: what devices may run the package on; ONNX Runtime is always among them.
    """

    model: Path
    labels: tuple[str, ...]
    output: Path
    slices: SliceOptions
    sequence_limit: int
    quantisation: str
    check_texts: tuple[str, ...]
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
        ModelError: the model cannot be exported, or the programs disagree with torch.
    """
    if "executorch" in options.engines:
        require_executorch()
    if options.output.exists():
        raise ModelError(f"{options.output} exists already; choose another --output or remove it")

    # 1. Load and attach slices.
    progress(f"Loading {options.model.name} and attaching {options.slices.kind} slices")
    model = load_model(options.model, len(options.labels), options.slices)
    sequence_limit = min(options.sequence_limit, model.position_limit)

    # 2. Capture as one graph, cut into segments, quantise frozen matrices.
    progress("Capturing the model and cutting it into segments")
    segments, tensors = quantise_capture(capture(model), options.quantisation)

    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".export-") as temporary:
        folder = Path(temporary) / "package"
        (folder / "programs").mkdir(parents=True)
        (folder / "weights").mkdir()

        # 3. Trace and lower each distinct structure once.
        programs, names = _write_programs(
            folder,
            segments,
            tensors,
            model.position_limit,
            OFFERED[options.quantisation],
            progress,
            sequence_limit if "executorch" in options.engines else None,
        )
        ir.save(probe(), folder / PROBE)

        # 4. Write weights, slices and tokenizer.
        progress("Writing weights")
        manifest_segments = tuple(
            Segment(segment.name, *names[i], weights=_write_weights(folder, segment, tensors))
            for i, segment in enumerate(segments)
        )
        specs = _slice_specs(segments, tensors, options.slices.kind)
        (folder / STATE).write_bytes(_initial_state(segments, tensors))
        pad_token_id = _write_tokenizer(options.model, folder / TOKENIZER)

        # 5. Compare with torch on real text, then describe and sign.
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=_safe_name(options.model.name),
            task="classification",
            labels=options.labels,
            sequence_limit=sequence_limit,
            pad_token_id=pad_token_id,
            base=Base(
                architecture=model.architecture,
                source=options.model.name,
                parameters=model.parameters,
                hidden_size=model.hidden_size,
                quantisation="int8" if options.quantisation == "int8" else "none",
            ),
            files=_list_files(folder),
            programs=programs,
            segments=manifest_segments,
            slices=specs,
            tokenizer=TOKENIZER,
            initial_state=STATE,
            self_checks={},
            probe=PROBE,
        )
        progress("Comparing the programs with torch on real text")
        reference = TorchReference(segments, tensors)
        draft = Package(folder, manifest, "")
        checks = check_package(draft, reference, options.check_texts)
        if "executorch" in options.engines:
            on_executorch = check_package(draft, reference, options.check_texts, "executorch")
            manifest = msgspec.structs.replace(manifest, executorch_checks=on_executorch)
        manifest = _without_poor_arithmetics(msgspec.structs.replace(manifest, self_checks=checks), folder)
        data = msgspec.json.encode(manifest, order="sorted")
        write_durably(folder / MANIFEST, data)
        write_durably(folder / SIGNATURE, signer.sign(data).encode())
        rename_durably(folder, options.output)
    return Package.open(options.output, signer.public_key)


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


def _kinds(segment: SegmentGraph) -> tuple[ProgramKind, ...]:
    if segment.name == "embedding":
        return ("primal",)
    return ("primal", "dual") if segment.name == HEAD else ("primal", "entry", "dual")


def _write_programs(
    folder: Path,
    segments: tuple[SegmentGraph, ...],
    tensors: dict[str, Tensor],
    position_limit: int,
    arithmetics: tuple[Arithmetic, ...],
    progress: Progress,
    executorch_limit: int | None,
) -> tuple[dict[str, Program], list[tuple[str, str | None, str | None]]]:
    """Trace and lower; returns programs by name, and for each segment its (primal, entry, dual) names.

    ``executorch_limit`` is the longest sequence of ExecuTorch's programs; None writes none.
    """
    programs: dict[str, Program] = {}
    by_structure: dict[object, tuple[str, str | None, str | None]] = {}
    names = []
    for segment in segments:
        structure = structure_of(segment, tensors)
        if structure not in by_structure:
            made: dict[ProgramKind, str] = {}
            for kind in _kinds(segment):
                name = f"{segment.name}.{kind}"
                progress(f"Lowering {name}")
                traced = trace(segment, kind, tensors, position_limit)
                flowing = tuple(n for n in traced.inputs if n not in segment.weights)
                executorch = _write_executorch(folder, name, traced, executorch_limit)
                lowered = lower(traced)  # rewrites what was traced
                order_for_memory(lowered)  # arithmetics replace nodes where they stand
                variants = _write_variants(folder, name, lowered, flowing, arithmetics)
                programs[name] = Program(flowing, traced.outputs, variants, executorch)
                made[kind] = name
            by_structure[structure] = (made["primal"], made.get("entry"), made.get("dual"))
        names.append(by_structure[structure])
    return programs, names


def require_executorch() -> None:
    """Raise :class:`ConfigError` with the command that installs ExecuTorch, if it is not installed."""
    if find_spec("executorch") is None:
        raise ConfigError(
            "engine executorch is not installed; install it: pip install 'edge-runtime[executorch]'"
        )


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


def _write_weights(folder: Path, segment: SegmentGraph, tensors: dict[str, Tensor]) -> dict[str, TensorRef]:
    """Write one segment's frozen tensors to one file."""
    if not segment.weights:
        return {}
    file = f"weights/{segment.name}.bin"
    references = {}
    with (folder / file).open("wb") as out:
        for name, source in segment.weights.items():
            array = (
                tensors[source].contiguous().numpy()
            )  # numpy's ascontiguousarray would give a scalar an axis
            out.write(b"\0" * (-out.tell() % TENSOR_ALIGNMENT_BYTES))
            references[name] = TensorRef(file, out.tell(), _dtype_name(array), array.shape)
            out.write(array.tobytes())
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


def _slice_specs(
    segments: tuple[SegmentGraph, ...], tensors: dict[str, Tensor], kind: SliceKind
) -> tuple[SliceSpec, ...]:
    specs = []
    for index, segment in enumerate(segments):
        grouped: dict[str, list[TensorSpec]] = {}
        for placeholder, source in segment.slices.items():
            name, tensor = _flat_name(source)
            shape = tuple(tensors[source].shape)
            grouped.setdefault(name, []).append(TensorSpec(tensor, shape, placeholder))
        for name, parts in grouped.items():
            chosen: SliceKind | Literal["head"] = "head" if name == HEAD else kind
            specs.append(SliceSpec(name, chosen, (index,), target=name, tensors=tuple(parts)))
    return tuple(specs)


def _initial_state(segments: tuple[SegmentGraph, ...], tensors: dict[str, Tensor]) -> bytes:
    sources = [source for segment in segments for source in segment.slices.values()]
    return encode_values({key(*_flat_name(source)): tensors[source].numpy() for source in sources})


def _write_tokenizer(model: Path, path: Path) -> int:
    """Write the tokenizer as one JSON file; returns the padding id."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, use_fast=True)
        path.write_text(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{model} has no tokenizer the device could read: {reason}") from error
    return int(tokenizer.pad_token_id or 0)


def _list_files(folder: Path) -> dict[str, FileEntry]:
    return {
        str(path.relative_to(folder)): FileEntry(path.stat().st_size, sha256_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("-.") or "model"
