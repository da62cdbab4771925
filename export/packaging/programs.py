"""A package's program files: each segment as primal, entry, dual and adjoint program, in each arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from msgspec.structs import replace

from edge_runtime.package.manifest import Arithmetic, Program, Quantisation, SizeTerm, Variant
from export.capture.segment import SegmentGraph, structure_of
from export.lowering.arithmetic import (
    PACKED_ARITHMETICS,
    has_frozen_products,
    rounds_activations,
    with_arithmetic,
)
from export.lowering.live_sets import live_sets, peak_tensors
from export.lowering.onnx import lower
from export.lowering.schedule import REFERENCE, order_for_memory
from export.lowering.trace import ProgramKind, TracedProgram, trace
from export.model.heads import HEAD
from export.quantisation.stored import StoredModel

#: Which arithmetics a package can offer, by how its weights are stored.
OFFERED: dict[Quantisation, tuple[Arithmetic, ...]] = {
    "int8": ("row_int8", "block_int8", "float"),
    "int4": ("row_int8", "block_int4", "float"),
    "none": ("float",),
}
#: Arithmetics in which a frozen product can be read transposed.
ADJOINT_ARITHMETICS: tuple[Arithmetic, ...] = ("row_int8", "float")
#: How many tensors of a program's largest live set the manifest names.
PEAK_TENSORS = 8

#: Called with a sentence as each stage begins.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ProgramOptions:
    """Which programs a package gets.

    Attributes:
        position_limit: longest sequence the model has positions for, in tokens.
        arithmetics: arithmetics to write every program in; adjoint programs only in those that can read a frozen
            matrix transposed.
        with_adjoint: whether to write the adjoint programs that backpropagation runs.
        executorch_limit: longest sequence of ExecuTorch's programs, in tokens; None if the package has none.
    """

    position_limit: int
    arithmetics: tuple[Arithmetic, ...]
    with_adjoint: bool
    executorch_limit: int | None


def write_programs(
    folder: Path, stored: StoredModel, options: ProgramOptions, progress: Progress
) -> tuple[dict[str, Program], list[dict[ProgramKind, str]]]:
    """Trace and lower each distinct structure once; blocks of equal structure share their programs.

    Args:
        folder: package that is being written; the files go to its ``programs/``.
        stored: segments of the model.
        options: which programs to write.
        progress: called with a sentence before each program.

    Returns:
        The programs by name; and for each segment the names of its programs, by kind.

    Raises:
        ModelError: an operator has no tangent or adjoint rule, or an engine cannot lower a program.
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
            for kind in _kinds(segment, options.with_adjoint, behind_slices):
                name = f"{segment.name}.{kind}"
                progress(f"Lowering {name}")
                traced = trace(segment, kind, stored.shapes, options.position_limit)
                programs[name] = _write_program(folder, name, kind, traced, options)
                made[kind] = name
            by_structure[structure] = made
        names.append(by_structure[structure])
    return programs, _with_decoding(folder, stored, options, progress, programs, names)


def dual_live_sets(
    stored: StoredModel, options: ProgramOptions
) -> dict[Arithmetic, tuple[tuple[SizeTerm, ...], ...]]:
    """Largest live sets of the last block's dual program in each arithmetic; nothing is written."""
    lowered = lower(trace(stored.segments[-2], "dual", stored.shapes, options.position_limit))
    order_for_memory(lowered)
    products = has_frozen_products(lowered)
    return {a: live_sets(with_arithmetic(lowered, a) if products else lowered) for a in options.arithmetics}


def _with_decoding(
    folder: Path,
    stored: StoredModel,
    options: ProgramOptions,
    progress: Progress,
    programs: dict[str, Program],
    names: list[dict[ProgramKind, str]],
) -> list[dict[ProgramKind, str]]:
    """The names with those of decode programs, which are written and added to ``programs``."""
    if not stored.decoding:
        return names
    by_structure: dict[object, str] = {}
    added = []
    for segment, made in zip(stored.decoding, names, strict=True):
        structure = structure_of(segment, stored.shapes)
        if structure not in by_structure:
            name = f"{segment.name}.decode"
            progress(f"Lowering {name}")
            traced = trace(segment, "decode", stored.shapes, options.position_limit)
            programs[name] = _write_program(folder, name, "decode", traced, options)
            by_structure[structure] = name
        added.append({**made, "decode": by_structure[structure]})
    return added


def _kinds(segment: SegmentGraph, with_adjoint: bool, behind_slices: bool) -> tuple[ProgramKind, ...]:
    """The programs a segment needs.

    Args:
        segment: segment in question.
        with_adjoint: whether adjoint programs are wanted at all.
        behind_slices: whether this segment or one before it has slices, so that its values may carry tangents.
    """
    if not segment.slices and not behind_slices:
        return ("primal",)
    enters = bool(segment.slices) and segment.name != HEAD
    forward: tuple[ProgramKind, ...] = ("primal", "entry", "dual") if enters else ("primal", "dual")
    return (*forward, "adjoint") if with_adjoint else forward


def _write_program(
    folder: Path, name: str, kind: ProgramKind, traced: TracedProgram, options: ProgramOptions
) -> Program:
    """Lower one recorded program for every engine and arithmetic, and describe its files."""
    flowing = tuple(each for each in traced.inputs if each not in traced.weights)
    lowered = lower(traced)
    order_for_memory(lowered)  # before arithmetics, which replace nodes where they stand
    offered = tuple(a for a in options.arithmetics if kind != "adjoint" or a in ADJOINT_ARITHMETICS)
    variants = _write_variants(folder, name, lowered, flowing, offered)
    packed = _write_packed(folder, name, lowered, variants) if kind in ("primal", "decode") else {}
    limit = options.executorch_limit if kind not in ("adjoint", "decode") else None
    return Program(flowing, traced.outputs, variants, _write_executorch(folder, name, traced, limit), packed)


def _write_executorch(
    folder: Path, name: str, traced: TracedProgram, sequence_limit: int | None
) -> dict[Arithmetic, Variant]:
    if sequence_limit is None:
        return {}
    from export.lowering.write_executorch import write_executorch  # noqa: PLC0415 - an extra, loaded where it is asked for

    return {"float": write_executorch(folder, name, traced, sequence_limit)}


def _write_variants(
    folder: Path, name: str, model: ir.Model, flowing: tuple[str, ...], arithmetics: tuple[Arithmetic, ...]
) -> dict[Arithmetic, Variant]:
    """Write a lowered program in each arithmetic; once, where they do not differ."""
    if not has_frozen_products(model):
        return dict.fromkeys(arithmetics, _write_variant(folder, name, model, flowing))
    variants = {
        arithmetic: _write_variant(
            folder, f"{name}.{arithmetic}", with_arithmetic(model, arithmetic), flowing
        )
        for arithmetic in arithmetics
    }
    if "row_int8" in variants and rounds_activations(model):
        signed = f"programs/{name}.row_int8.signed.onnx"
        ir.save(with_arithmetic(model, "row_int8", signed=True), folder / signed)
        variants["row_int8"] = replace(variants["row_int8"], signed=signed)
    return variants


def _write_packed(
    folder: Path, name: str, model: ir.Model, fed: dict[Arithmetic, Variant]
) -> dict[Arithmetic, Variant]:
    """The program once more with its matrices bound, for workers that answer; what it holds at a time is the same."""
    packed: dict[Arithmetic, Variant] = {}
    for arithmetic in PACKED_ARITHMETICS if has_frozen_products(model) else ():
        if arithmetic not in fed:
            continue
        file, signed = f"programs/{name}.{arithmetic}.packed.onnx", None
        program = with_arithmetic(model, arithmetic, packed=True)
        ir.save(program, folder / file)
        if fed[arithmetic].signed is not None:
            signed = f"programs/{name}.{arithmetic}.packed.signed.onnx"
            ir.save(with_arithmetic(model, arithmetic, packed=True, signed=True), folder / signed)
        bound = _bound(program)
        left = tuple(each for each in fed[arithmetic].fed if each not in bound)
        packed[arithmetic] = replace(fed[arithmetic], file=file, fed=left, bound=bound, signed=signed)
    return packed


def _bound(model: ir.Model) -> tuple[str, ...]:
    """Names of the weights that the runtime binds."""
    values = model.graph.initializers.values()
    return tuple(str(value.name) for value in values if isinstance(value.const_value, ir.ExternalTensor))


def _write_variant(folder: Path, name: str, model: ir.Model, flowing: tuple[str, ...]) -> Variant:
    file = f"programs/{name}.onnx"
    ir.save(model, folder / file)
    return Variant(
        file=file,
        fed=tuple(str(value.name) for value in model.graph.inputs if value.name not in flowing),
        bound=_bound(model),
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
