"""`make bench-memory`: the runtime's memory and time against PyTorch's, at the shapes of three encoders.

Every row is a fresh process. Where a peak is promised, the kernel holds the worker to that value, so a row that was
measured ran under it. Peers are PyTorch LoRA steps (Transformers and peft) on the same rows and threads, in the same
run: whole batch and one example at a time, plain and checkpointed. Arms take turns, and ratios are taken within a turn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import msgspec

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.measured_process import pinned_to_cores, python_program, run_measured
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.shapes import BERT_BASE, BERT_LARGE
from benchmarks.harness.tables import table
from benchmarks.harness.turns import Readings, take_turns
from benchmarks.memory.subjects import MINILM, TOKENS, Subject, make_subjects, step_seconds
from benchmarks.memory.torch_peer import run_torch_steps
from edge_runtime.errors import OutOfMemoryError
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.worker.jobs import TrainOutcome
from edge_runtime.worker.process import run_worker

RESULT = RESULTS / "memory.json"
BATCH, WARM_UP_STEPS = 8, 1
MB = 1_000_000
RESIDENT, STREAMED = ExecutionChoice("resident", 1, 1), ExecutionChoice("streamed", 1, 1)
PEER_SHARE = 1 / 6


class TorchBench:
    """Runs workers, PyTorch's steps and single blocks; each gives sizes in bytes and ``step`` in seconds."""

    def __init__(self, subjects: dict[str, Subject], steps: int) -> None:
        self.subjects = subjects
        self.steps = steps
        self.enforcers: set[str] = set()

    def arms(self) -> dict[str, Callable[[], Readings | None]]:
        """Everything that is measured, by title: for each model its peers and workers, then blocks and prefix cache."""
        arms: dict[str, Callable[[], Readings | None]] = {}
        for name in self.subjects:
            for title, (checkpointing, micro_batch) in PEERS.items():
                arms[f"{name}, {title}"] = partial(
                    self.peer, name, title, checkpointing=checkpointing, micro_batch=micro_batch
                )
            for model, title, choice, draws, reach_mb in WORKERS:
                if model == name:
                    arms[f"{name}, {title}"] = partial(
                        self.worker, name, title, choice, draws=draws, cap_mb=reach_mb or 4000
                    )
        for arithmetic, rows in BLOCKS:
            arms[_block_title(arithmetic, rows)] = partial(self.block, BERT_BASE.name, arithmetic, rows)
        minilm = self.subjects[MINILM]
        last_block = tuple(name for name in minilm.slices if f".{_blocks(minilm) - 1}." in name)
        for title, cache_bytes in (("without prefix cache", 0), ("with prefix cache", PREFIX_BYTES)):
            arms[f"{MINILM}, last block, {title}"] = partial(
                self.worker,
                MINILM,
                f"last block, {title}",
                RESIDENT,
                steps=PREFIX_STEPS,
                slices=last_block,
                prefix_cache_bytes=cache_bytes,
            )
        return arms

    def worker(
        self,
        name: str,
        title: str,
        choice: ExecutionChoice,
        *,
        draws: int = 1,
        cap_mb: int = 4000,
        steps: int | None = None,
        slices: tuple[str, ...] | None = None,
        prefix_cache_bytes: int = 0,
    ) -> Readings | None:
        """One worker under a cap; if the kernel kills it, None after a line that says so."""
        job = self.subjects[name].job(
            choice,
            draws=draws,
            steps=steps or WARM_UP_STEPS + self.steps,
            batch_size=BATCH,
            cap_bytes=cap_mb * MB,
            slices=slices,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        try:
            outcome = run_worker(job, TrainOutcome)
        except OutOfMemoryError as error:
            print(f"  {name}, {title}: {error}", flush=True)
            return None
        memory = outcome.memory
        self.enforcers.add(memory.enforced_by)
        return _shown(
            f"{name}, {title}",
            {
                "peak": memory.high_water_bytes,
                "charged": memory.cgroup_peak_bytes or 0,
                "anonymous": memory.anonymous_bytes,
                "step": step_seconds(outcome.steps, WARM_UP_STEPS),
                "hits": outcome.prefix_hits / max(1, outcome.prefix_hits + outcome.prefix_misses),
            },
        )

    def peer(self, name: str, title: str, *, checkpointing: bool, micro_batch: int) -> Readings:
        """PyTorch's LoRA step."""
        took = run_torch_steps(
            self.subjects[name],
            batch_size=BATCH,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            warm_up_steps=WARM_UP_STEPS,
            steps=self.steps,
        )
        charged = took.measured.cgroup_peak_bytes or 0
        return _shown(
            f"{name}, {title}", {"peak": took.resident_bytes, "charged": charged, "step": took.step_s}
        )

    def block(self, name: str, arithmetic: Arithmetic, rows: int) -> Readings:
        """One block's dual program over its primal program, in turns within one process."""
        job = self.subjects[name].job(RESIDENT, arithmetic=arithmetic)
        command = python_program("benchmarks.memory.block_programs", "1,4", 40, rows)
        seconds = json.loads(run_measured(command, msgspec.json.encode(job)).output)
        primal, one, four = (median(seconds[key]) for key in ("0", "1", "4"))
        return _shown(_block_title(arithmetic, rows), {"one": one / primal, "four": four / primal})


def _shown(title: str, readings: Readings) -> Readings:
    """Print what an arm gave, and return it."""
    shown = {what: f"{v / MB:.1f} MB" if v > 1e4 else f"{v:.3f}" for what, v in readings.items()}
    print(f"  {title}: {shown}", flush=True)
    return readings


def _block_title(arithmetic: Arithmetic, rows: int) -> str:
    return f"block of {BERT_BASE.name}, {arithmetic}, {rows} × {TOKENS}"


PEERS = {
    "PyTorch": (False, BATCH),
    "PyTorch, checkpointed": (True, BATCH),
    "PyTorch, one example at a time": (False, 1),
    "PyTorch, checkpointed, one example at a time": (True, 1),
}
#: (model, arm, choice, draws, reach of the peak in MB)
WORKERS = (
    (MINILM, "resident", RESIDENT, 1, 110),
    (MINILM, "streamed", STREAMED, 1, 110),
    (BERT_BASE.name, "resident", RESIDENT, 1, 250),
    (BERT_BASE.name, "streamed", STREAMED, 1, 115),
    (BERT_BASE.name, "resident, best speed", ExecutionChoice("resident", 2, 1), 1, None),
    (BERT_BASE.name, "resident, best speed, 4 draws", ExecutionChoice("resident", 2, 4), 4, None),
    (BERT_LARGE.name, "resident", RESIDENT, 1, None),
    (BERT_LARGE.name, "streamed", STREAMED, 1, 140),
)
ANONYMOUS_REACH_MB = 130
STREAMED_TIME_REACH = 1.2
#: Best speed is the plan that is chosen where memory does not matter: two examples at a time.
STEP_REACH = {"resident, best speed": 0.5, "resident, best speed, 4 draws": 1.2}
DUAL_REACH = {"one": 2.1, "four": 5.0}
BLOCKS: tuple[tuple[Arithmetic, int], ...] = (
    ("row_int8", 1),
    ("row_int8", 2),
    ("block_int8", 1),
    ("float", 1),
)
#: The prefix cache serves tasks whose slices lie near the head; these meet each of the 64 rows every eighth step.
PREFIX_STEPS, PREFIX_BYTES = 32, 1 << 30


def main() -> int:
    """Measure everything in turns and write the table."""
    parser = bench_parser(__doc__.splitlines()[0], RESULT, repetitions=3, steps=3)
    arguments = parser.parse_args()
    cores = pinned_to_cores(arguments.threads)
    subjects = make_subjects(arguments.folder, arguments.threads, (MINILM, BERT_BASE.name, BERT_LARGE.name))
    bench = TorchBench(subjects, arguments.steps)
    turns = take_turns(bench.arms(), arguments.repetitions)
    conditions = {
        "batch": f"{BATCH} x {TOKENS} tokens",
        "repetitions": arguments.repetitions,
        "steps": arguments.steps,
        "cores": len(cores),
        "judge": ", ".join(sorted(bench.enforcers)),
    }
    command = command_line("benchmarks.memory.against_torch", "bench-memory")
    document = write_result(
        arguments.output, command, arguments.threads, _figures(subjects, turns), conditions
    )
    print("\n" + table(document))
    return 0


def _blocks(subject: Subject) -> int:
    """The number of blocks: embedding and head are segments, but no blocks."""
    return len(subject.manifest.segments) - 2


def _figures(subjects: Mapping[str, Subject], turns: Mapping[str, list[Readings]]) -> list[Figure]:
    figures: list[Figure] = []

    def add(name: str, unit: str, key: str, what: str, reach: float | None = None) -> None:
        if turns[key]:
            figures.append(figure(name, unit, [readings[what] for readings in turns[key]], reach))

    def ratio(name: str, key: str, over: str, what: str, reach: float | None) -> None:
        if turns[key] and turns[over]:
            pairs = zip(turns[key], turns[over], strict=False)
            figures.append(figure(name, "times", [a[what] / b[what] for a, b in pairs], reach))

    for name in subjects:
        for title in PEERS:
            add(f"{name}, {title}: peak", "bytes", f"{name}, {title}", "peak")
        smallest = min(PEERS, key=lambda title: median(v["peak"] for v in turns[f"{name}, {title}"]))
        for model, title, _, _, reach_mb in WORKERS:
            if model != name:
                continue
            key = f"{name}, {title}"
            add(f"{key}: peak", "bytes", key, "peak", reach_mb and reach_mb * MB)
            add(
                f"{key}: of which anonymous",
                "bytes",
                key,
                "anonymous",
                ANONYMOUS_REACH_MB * MB if key == f"{BERT_BASE.name}, resident" else None,
            )
            add(f"{key}: charged by the kernel", "bytes", key, "charged")
            if reach_mb:
                ratio(
                    f"{key}: peak over the smallest peer ({smallest})",
                    key,
                    f"{name}, {smallest}",
                    "peak",
                    PEER_SHARE,
                )
    for name in subjects:
        plain = f"{name}, PyTorch"
        add(f"{plain}: step", "seconds", plain, "step")
        for model, title, _, _, _ in WORKERS:
            if model == name:
                key = f"{name}, {title}"
                add(f"{key}: step", "seconds", key, "step")
                reach = STEP_REACH.get(title) if name == BERT_BASE.name else None
                ratio(f"{key}: step over PyTorch's", key, plain, "step", reach)
        ratio(
            f"{name}: streamed step over resident",
            f"{name}, streamed",
            f"{name}, resident",
            "step",
            STREAMED_TIME_REACH,
        )
    for arithmetic, rows in BLOCKS:
        key = _block_title(arithmetic, rows)
        for what, draws in (("one", "1 draw"), ("four", "4 draws")):
            add(
                f"{key}: dual over primal, {draws}",
                "times",
                key,
                what,
                DUAL_REACH[what],
            )
    with_cache, without = (f"{MINILM}, last block, {word} prefix cache" for word in ("with", "without"))
    add(f"{with_cache}: step", "seconds", with_cache, "step")
    ratio(f"{with_cache}: step over without", with_cache, without, "step", None)
    return figures


if __name__ == "__main__":
    sys.exit(main())
