"""`make bench-predict`: one text of 32 tokens classified by all-MiniLM-L6-v2, beside ONNX Runtime used directly.

The peer is the same model with the same mean pooling and a head of as many classes, exported by ``torch.onnx`` and
quantised by ONNX Runtime's own ``quantize_dynamic`` (int8 weights for each output, int8 activations): what
``optimum`` does. Both answer the same text from processes of their own, turn about. A request to the runtime goes
through its worker's pipe and back, and counts whole.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.long_rows import LABELS, write_full_rows
from benchmarks.harness.measured_process import pinned_to_cores, python_program, run_measured
from benchmarks.harness.minilm import packaged_model
from benchmarks.harness.result_file import RESULTS, figure, write_result
from benchmarks.harness.tables import table
from benchmarks.memory.subjects import MINILM, make_subjects
from edge_runtime.memory.meter import status_bytes
from edge_runtime.serving.session import InferenceSession
from edge_runtime.worker.inference_jobs import InferenceJob

RESULT = RESULTS / "predict.json"
TOKENS, REQUESTS = 32, 400
CAP_BYTES = 256 << 20
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

    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for _ in range(arguments.repetitions):
        theirs.append(_peer(peer, packaged_model() / "tokenizer.json", text, arguments.threads))
        job = InferenceJob(
            package_folder=str(subject.package),
            package_sha256=subject.sha256,
            prepared_folder=str(prepared),
            state_path=str(subject.package / subject.manifest.initial_state),
            cap_bytes=CAP_BYTES,
            threads=arguments.threads,
            sequence_limit=TOKENS,
        )
        ours.append(_runtime(job, text))
    if {each["tokens"] for each in (*ours, *theirs)} != {TOKENS}:
        raise SystemExit(f"error: the text has not {TOKENS} tokens on both sides")

    def ratios(name: str) -> list[float]:
        return [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]

    figures = [
        figure("time of one text, relative to onnxruntime", "times", ratios("seconds"), TIME_REACH),
        figure("peak of the process with the model, relative", "times", ratios("peak_bytes"), PEAK_REACH),
        figure("runtime: time of one text", "seconds", [each["seconds"] for each in ours]),
        figure("onnxruntime: time of one text", "seconds", [each["seconds"] for each in theirs]),
        figure("runtime: peak of the worker", "bytes", [int(each["peak_bytes"]) for each in ours]),
        figure(
            "runtime: resident in the command beside it",
            "bytes",
            [int(each["parent_bytes"]) for each in ours],
        ),
        figure("onnxruntime: peak", "bytes", [int(each["peak_bytes"]) for each in theirs]),
    ]
    conditions = {
        "text": f"one text of {TOKENS} tokens, {REQUESTS} requests, the first quarter left out",
        "classes": len(json.loads(LABELS.read_text())),
        "arithmetic": ours[0]["arithmetic"],
    }
    command = command_line("benchmarks.inference.against_onnxruntime", "bench-predict")
    document = write_result(arguments.output, command, arguments.threads, figures, conditions)
    print("\n" + table(document))
    return 0


def _runtime(job: InferenceJob, text: str) -> dict[str, Any]:
    """Median seconds of a request to a fresh worker, and the worker's peak."""
    with InferenceSession.start(job) as session:
        seconds = []
        for _ in range(REQUESTS):
            started = time.perf_counter()
            answer = session.classify(text)
            seconds.append(time.perf_counter() - started)
        status = Path(f"/proc/{session._worker.process.pid}/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return {
            "seconds": median(seconds[len(seconds) // 4 :]),
            "peak_bytes": peak,
            "parent_bytes": status_bytes("VmRSS"),
            "tokens": answer.tokens,
            "arithmetic": session.ready.arithmetic,
        }


def _peer(model: Path, tokenizer: Path, text: str, threads: int) -> dict[str, Any]:
    command = python_program(
        "benchmarks.inference.onnxruntime_peer",
        *(model, tokenizer, text),
        *("--tokens", TOKENS, "--threads", threads, "--requests", REQUESTS),
    )
    found: dict[str, Any] = json.loads(run_measured(command).output)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
