"""`make bench-predict`: one text of 32 tokens classified by all-MiniLM-L6-v2, beside ONNX Runtime used directly.

The peer is the same model with the same mean pooling and a head of as many classes, exported by ``torch.onnx`` and
quantised by ONNX Runtime's own ``quantize_dynamic`` (int8 weights for each output, int8 activations): what
``optimum`` does. Both answer the same text from processes of their own, turn about. A request to the runtime goes
through its worker's pipe and back, and counts whole. Of the peer with waiting threads that spin, its default, and with
threads that sleep, the faster counts. The runtime is measured under an ample cap, which keeps weights resident, and
under the smallest that it takes, where they pass through memory a segment at a time.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import structs

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.long_rows import LABELS, write_full_rows
from benchmarks.harness.measured_process import pinned_to_cores, python_program, run_measured
from benchmarks.harness.minilm import packaged_model
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.tables import table
from benchmarks.memory.subjects import MINILM, make_subjects
from edge_runtime.memory.plan import Planner
from edge_runtime.package.prepared import read_prepared
from edge_runtime.serving.session import InferenceSession
from edge_runtime.worker.inference import inference_work
from edge_runtime.worker.inference_jobs import InferenceJob

RESULT = RESULTS / "predict.json"
TOKENS, REQUESTS = 32, 400
AMPLE_CAP_BYTES = 256 << 20
TIME_REACH, PEAK_REACH = 1.2, 0.7


def main() -> int:
    """Make both models, measure them in turn, write the table."""
    parser = bench_parser(__doc__.splitlines()[0], RESULT, repetitions=5)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    subject = make_subjects(folder, arguments.threads, (MINILM,))[MINILM]
    peer = folder / "minilm-dynamic-int8.onnx"
    if not peer.exists():
        run_measured(python_program("benchmarks.inference.write_peer", packaged_model(), peer))
    rows = folder / "predict-rows.jsonl"
    write_full_rows(rows, packaged_model() / "tokenizer.json", TOKENS, 1)
    text = json.loads(rows.read_text().splitlines()[0])["text"]
    prepared = subject.prepared()
    pinned_to_cores(arguments.threads)

    tokenizer = packaged_model() / "tokenizer.json"
    job = InferenceJob(
        package_folder=str(subject.package),
        package_sha256=subject.sha256,
        prepared_folder=str(prepared),
        state_path=str(subject.package / subject.manifest.initial_state),
        cap_bytes=AMPLE_CAP_BYTES,
        threads=arguments.threads,
        sequence_limit=TOKENS,
    )
    planner = Planner(subject.manifest, read_prepared(prepared).arithmetic)
    smallest_bytes = planner.smallest_cap(inference_work(subject.manifest, TOKENS))
    theirs: list[dict[str, Any]] = []
    ours: dict[str, list[dict[str, Any]]] = {"ample": [], "smallest": []}
    for _ in range(arguments.repetitions):
        spinning, sleeping = (
            _peer(peer, tokenizer, text, arguments.threads, more) for more in ((), ("--no-spinning",))
        )
        theirs.append(min(spinning, sleeping, key=lambda each: float(each["seconds"])))
        ours["ample"].append(_runtime(job, text))
        ours["smallest"].append(_runtime(structs.replace(job, cap_bytes=smallest_bytes), text))
    if {each["tokens"] for each in (*theirs, *ours["ample"])} != {TOKENS}:
        raise SystemExit(f"error: the text has not {TOKENS} tokens on both sides")
    figures = [
        *(row for cap, measured in ours.items() for row in _beside(cap, measured, theirs)),
        figure("onnxruntime: time of one text", "seconds", [each["seconds"] for each in theirs]),
        figure(
            "onnxruntime: processor time of one text", "seconds", [each["processor_s"] for each in theirs]
        ),
        figure("onnxruntime: peak", "bytes", [int(each["peak_bytes"]) for each in theirs]),
    ]
    conditions = {
        "text": f"one text of {TOKENS} tokens, {REQUESTS} requests, the first quarter left out",
        "classes": len(json.loads(LABELS.read_text())),
        "arithmetic": ours["ample"][0]["arithmetic"],
        "caps_bytes": {cap: measured[0]["cap_bytes"] for cap, measured in ours.items()},
    }
    command = command_line("benchmarks.inference.against_onnxruntime", "bench-predict")
    document = write_result(arguments.output, command, arguments.threads, figures, conditions)
    print("\n" + table(document))
    return 0


def _beside(cap: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[Figure]:
    """Figures of the runtime under one cap, relative to the peer's of the same turn and by themselves."""

    def ratios(name: str) -> list[float]:
        return [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]

    return [
        figure(
            f"{cap} cap: time of one text, relative to onnxruntime", "times", ratios("seconds"), TIME_REACH
        ),
        figure(f"{cap} cap: processor time of one text, relative", "times", ratios("processor_s")),
        figure(f"{cap} cap: peak of the worker, relative", "times", ratios("peak_bytes"), PEAK_REACH),
        figure(f"{cap} cap: time of one text", "seconds", [each["seconds"] for each in ours]),
        figure(f"{cap} cap: processor time of one text", "seconds", [each["processor_s"] for each in ours]),
        figure(f"{cap} cap: peak of the worker", "bytes", [int(each["peak_bytes"]) for each in ours]),
    ]


def _runtime(job: InferenceJob, text: str) -> dict[str, Any]:
    """Median seconds of a request to a fresh worker, and the worker's peak."""
    with InferenceSession.start(job) as session:
        process_id, seconds = session._worker.process.pid, []
        processor_s = _processor_seconds(process_id)
        for _ in range(REQUESTS):
            started = time.perf_counter()
            answer = session.classify(text)
            seconds.append(time.perf_counter() - started)
        processor_s = (_processor_seconds(process_id) - processor_s) / REQUESTS
        status = Path(f"/proc/{process_id}/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return {
            "seconds": median(seconds[len(seconds) // 4 :]),
            "processor_s": processor_s,
            "peak_bytes": max(peak, session.ready.load_peak_bytes),
            "cap_bytes": job.cap_bytes,
            "tokens": answer.tokens,
            "arithmetic": session.ready.arithmetic,
        }


def _processor_seconds(process_id: int) -> float:
    """Time that all threads of a process have run."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peer(model: Path, tokenizer: Path, text: str, threads: int, more: tuple[str, ...]) -> dict[str, Any]:
    command = python_program(
        "benchmarks.inference.onnxruntime_peer",
        *(model, tokenizer, text),
        *("--tokens", TOKENS, "--threads", threads, "--requests", REQUESTS),
        *more,
    )
    found: dict[str, Any] = json.loads(run_measured(command).output)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
