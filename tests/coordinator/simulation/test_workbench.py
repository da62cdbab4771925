"""What a bench keeps changes no value: outputs of frozen segments, executors, token ids. On a real package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.simulation import workbench
from coordinator.simulation.kept_prefixes import DevicePrefixes, KeptPrefixes
from coordinator.simulation.labelled_rows import LabelledRows, read_labelled_rows
from coordinator.simulation.workbench import BenchSettings, Job, Workbench
from edge_runtime.errors import DataError
from edge_runtime.execution.executor import Executor
from edge_runtime.package.block_head import with_block_head
from edge_runtime.package.slices import decode_values, encode_values, shapes
from edge_runtime.protocol.messages import decode_result
from edge_runtime.worker.jobs import EvaluateJob
from tests.export import tiny

QUERY = "encoder.layer.1.attention.self.query"
ROWS = ((0, 1, 2, 3, 4), (2, 3, 5, 6, 7), (0, 1, 2, 3, 4))


@pytest.fixture
def rows(tmp_path: Path) -> LabelledRows:
    """Eight rows of real text with labels in turn."""
    path = tmp_path / "data.jsonl"
    entries = [{"text": text, "label": tiny.LABELS[i % 3]} for i, text in enumerate(tiny.SENTENCES)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return read_labelled_rows(path)


@pytest.fixture
def folders(exported, prepared_in, tmp_path: Path) -> tuple[Path, Path]:
    """The int8 package and its layout, each under its digest."""
    found = []
    for name, folder in (
        ("packages", exported.package.folder),
        ("prepared", prepared_in["row_int8"].folder),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / exported.package.sha256).symlink_to(folder)
        found.append(tmp_path / name)
    return found[0], found[1]


def make_bench(folders: tuple[Path, Path], rows: LabelledRows, cache_bytes: int) -> Workbench:
    """A bench on the package."""
    return Workbench(BenchSettings(*folders, threads=1, prefix_cache_bytes=cache_bytes), rows, rows)


def jobs(exported, **task: object) -> list[Job]:
    """Tasks of three devices that share rows, the last on values that differ before the first trained slice."""
    values = tiny.flat(tiny.moved_slices(exported.reference))
    moved = {n: v + np.float32(0.05) if ".layer.0." in n else v for n, v in values.items()}
    return [
        Job(
            tiny.make_task(exported.package, **{"slices": (QUERY,), "round": number, "steps": 3, **task}),
            held,
            encode_values(state),
            1 << 30,
            1.0,
        )
        for number, (held, state) in enumerate(zip(ROWS, (values, values, moved), strict=True))
    ]


@pytest.mark.parametrize("update", ["forward", "backprop"])
def test_kept_prefixes_change_nothing(exported, folders, rows: LabelledRows, update: str) -> None:
    """With, without, and with too little room for a cache, tasks give identical bytes, however often they are done."""
    todo = jobs(exported, update=update, draws=1)
    bench = make_bench(folders, rows, 1 << 30)
    plain = [make_bench(folders, rows, 0).train(job) for job in todo]
    kept = [bench.train(job) for job in todo]
    assert bench.prefixes.hits > 0
    small = make_bench(folders, rows, 40_000)
    assert kept == plain
    assert [small.train(job) for job in todo] == plain
    misses = bench.prefixes.misses
    assert [bench.train(job) for job in reversed(todo)] == plain[::-1]
    assert bench.prefixes.misses == misses


def test_slices_before_the_first_trained_one_make_another_context(
    exported, folders, rows: LabelledRows
) -> None:
    """Values that moved before the trained slice are not answered by what was kept for others."""
    _, _, moved = jobs(exported)
    first = jobs(exported)[0]
    bench = make_bench(folders, rows, 1 << 30)
    bench.train(first)
    misses = bench.prefixes.misses
    bench.train(first)
    assert bench.prefixes.misses == misses
    bench.train(moved)
    assert bench.prefixes.misses >= misses + len(ROWS[2])


def test_rows_that_no_slice_changes_are_computed_once(
    exported, folders, rows: LabelledRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums and evaluations equal those of plain programs to the last bit; a row is computed again for moved slices."""
    blocks = (1, 2)
    asked = {"head": "closed_form", "features": blocks, "slices": (), "sums_dtype": "float32"}
    head = with_block_head(exported.package.manifest, blocks).slice_named("head")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes([head]).items()}
    todo = [
        replace(
            job, state=encode_values({**decode_values(job.state, exported.package.manifest.slices), **zeros})
        )
        for job in jobs(exported, **asked)
    ]
    sha256 = exported.package.sha256
    judged = EvaluateJob("", sha256, "", "", "", 32, 1 << 30, features=blocks)

    def done(bench: Workbench) -> list[object]:
        return [bench.train(job) for job in todo] + [bench.evaluate(judged, job.state) for job in todo]

    bench = make_bench(folders, rows, 1 << 30)
    kept = done(bench)
    distinct = len(set(ROWS[0]) | set(ROWS[1])) + len(ROWS[2])  # the last device's slices have moved
    assert bench.prefixes.misses == distinct + 2 * len(rows.texts)
    assert done(bench) == kept
    assert bench.prefixes.misses == distinct + 2 * len(rows.texts)
    monkeypatch.setattr(
        workbench,
        "FrozenExecutor",
        lambda prepared, engine, weights, _: Executor(prepared, engine, (), weights),
    )
    assert done(make_bench(folders, rows, 1 << 30)) == kept


def test_executors_make_room_for_each_other(
    exported, folders, rows: LabelledRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one executor, tasks of other slices still give what they give with room for all."""
    names = [spec.name for spec in exported.package.manifest.slices if spec.kind != "head"]
    values = encode_values(tiny.flat(tiny.moved_slices(exported.reference)))
    todo = [
        Job(tiny.make_task(exported.package, slices=(name,)), ROWS[0], values, 1 << 30, 1.0)
        for name in [*names[:3], names[0]]
    ]
    bench = make_bench(folders, rows, 0)
    wanted = [bench.train(job) for job in todo]
    monkeypatch.setattr(workbench, "MOST_EXECUTORS", 1)
    monkeypatch.setattr(workbench, "MOST_WEIGHTY_EXECUTORS", 1)
    bench = make_bench(folders, rows, 0)
    assert [bench.train(job) for job in todo] == wanted
    assert wanted[0] == wanted[3]


def test_a_result_holds_what_was_trained(exported, folders, rows: LabelledRows) -> None:
    """A result names task, examples, virtual seconds and predicted memory, and decodes to the change."""
    job = jobs(exported)[0]
    result = decode_result(make_bench(folders, rows, 0).train(job))
    manifest = exported.package.manifest
    change = decode_values(result.change, [manifest.slice_named(QUERY), manifest.slice_named("head")])
    assert any(np.abs(array).max() > 0 for array in change.values())
    assert (result.task_id, result.examples, result.steps_applied) == (job.task.task_id, 12, 3)
    assert result.seconds == 1.0
    assert result.memory.predicted_peak_bytes > 1 << 20
    assert result.memory.high_water_bytes == 0


def test_rows_that_do_not_fit_the_package_are_refused(exported, rows: LabelledRows, tmp_path: Path) -> None:
    """A label outside the package's set is named by file and line, and so are labels where none are wanted."""
    with pytest.raises(DataError, match=r"data\.jsonl line 3 has a label outside"):
        rows.indexed(tiny.LABELS[:2])
    with pytest.raises(DataError, match="language modelling takes none"):
        rows.indexed(())


def test_a_full_cache_forgets_contexts_that_are_not_in_use() -> None:
    """New contexts push old ones out, the present one keeps what it has, and the limit holds."""
    kept = KeptPrefixes(100)
    prefixes = DevicePrefixes(kept)
    entry = {"hidden": np.zeros(10, np.float32)}
    prefixes.turn_to("old", (7, 8, 9))
    for row in range(3):
        prefixes.store((row, 8), entry)
    assert [prefixes.load((row, 8)) is not None for row in range(3)] == [True, True, False]
    prefixes.turn_to("new", (8,))
    assert prefixes.load((0, 8)) is None
    prefixes.store((0, 8), entry)
    assert prefixes.load((0, 8)) is not None
    prefixes.turn_to("old", (7,))
    assert prefixes.load((0, 8)) is None
