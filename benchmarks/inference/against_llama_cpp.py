"""`make bench-generation`: speed and memory of generated texts, beside llama.cpp on the same shape and threads.

Models are stories260K and a Llama of 1.1 billion weights (random ones), in int4: 4 bits and a scale for every 32
inputs on both sides. llama.cpp comes with its binding for Node; it speaks in token ids, so texts cost it no tokenizer.
Each side generates the same number of tokens after the same prompt, the most probable token each time, from a process
of its own, turn about; of llama.cpp with one thread and with all, whose threads spin where they wait, the faster
counts. Before that both generate from stories260K in float32, and must give the same tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.long_rows import write_full_rows
from benchmarks.harness.measured_process import pinned_to_cores, python_program, run_measured
from benchmarks.harness.minilm import packaged_model
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.shapes import LLAMA_1B, write_decoder
from benchmarks.harness.tables import table
from benchmarks.memory.subjects import Subject, export_command, opened, without_labels
from edge_runtime.inference.requests import Finished, GenerateText, Sampling
from edge_runtime.serving.session import InferenceSession
from edge_runtime.worker.inference_jobs import InferenceJob

RESULT = RESULTS / "generation.json"
STORIES = "stories260K"
#: Tokens of each text, texts of each process of which the first does not count, and the longest text of a package.
TOKENS, TEXTS, LIMIT = 64, 4, 256
PROMPT = {STORIES: "Once upon a time", LLAMA_1B.name: "once upon a time"}
AMPLE_CAP_BYTES = 4 << 30
EMPTY_WORKER = "import numpy, onnxruntime, tokenizers, edge_runtime.worker.inference"


def main() -> int:
    """Make the models, measure both sides in turn, write the table."""
    parser = bench_parser(__doc__.splitlines()[0], RESULT, folder="build/bench-generation", repetitions=3)
    parser.add_argument("--data", type=Path, required=True, help="folder with model_stories260k")
    parser.add_argument("--models", default=f"{STORIES},{LLAMA_1B.name}")
    parser.add_argument(
        "--peer", type=Path, default=Path("build/llama-cpp"), help="where npm installed node-llama-cpp"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pinned_to_cores(arguments.threads)
    figures: list[Figure] = []
    for name in arguments.models.split(","):
        model = _model(folder, name, arguments.data)
        if name == STORIES:
            _check_same_tokens(folder, model, arguments)
        figures += _beside(folder, name, model, arguments)
    empty = run_measured([sys.executable, "-c", EMPTY_WORKER]).max_resident_bytes
    figures.append(figure("the runtime's worker before a model is loaded: peak", "bytes", [empty]))
    conditions = {
        "text": f"{TOKENS} tokens after {PROMPT[STORIES]!r}, {TEXTS} texts a process, the first left out"
    }
    command = command_line("benchmarks.inference.against_llama_cpp", "bench-generation")
    document = write_result(arguments.output, command, arguments.threads, figures, conditions)
    print("\n" + table(document))
    return 0


def _beside(folder: Path, name: str, model: Path, arguments: Any) -> list[Figure]:
    """Figures of both sides on one model."""
    subject = _package(folder, name, model, "int4", arguments.threads)
    gguf = _gguf(folder, name, model, "q4_0")
    ours, theirs = [], []
    for _ in range(arguments.repetitions):
        ours.append(_runtime(subject, name, arguments.threads))
        theirs.append(_peer(gguf, subject, name, arguments))
    speed = [[TOKENS / median(each["seconds"][1:]) for each in side] for side in (ours, theirs)]
    peaks = [[each["peak_bytes"] for each in side] for side in (ours, theirs)]
    empty = [each["empty_bytes"] for each in theirs]
    faster, larger = ([a / b for a, b in zip(*both, strict=True)] for both in (speed, peaks))
    return [
        figure(f"{name}, int4: tokens a second, relative to llama.cpp", "times", faster),
        figure(f"{name}, int4: peak, relative", "times", larger),
        figure(f"{name}, int4: time of a token", "seconds", [1 / each for each in speed[0]]),
        figure(f"{name}, int4: peak of the worker", "bytes", peaks[0]),
        figure(f"{name}, llama.cpp Q4_0: time of a token", "seconds", [1 / each for each in speed[1]]),
        figure(f"{name}, llama.cpp Q4_0: peak", "bytes", peaks[1]),
        figure(f"{name}, llama.cpp Q4_0: of that, before the model was loaded", "bytes", empty),
    ]


def _check_same_tokens(folder: Path, model: Path, arguments: Any) -> None:
    """In float32 both sides must tell the same story, or they do not run the same model."""
    subject = _package(folder, STORIES, model, "none", arguments.threads)
    ours = _runtime(subject, STORIES, arguments.threads)["text"]
    theirs = _peer(_gguf(folder, STORIES, model, "float32"), subject, STORIES, arguments)["ids"]
    tokenizer = Tokenizer.from_file(str(subject.package / subject.manifest.tokenizer))
    prompt = _prompt_ids(subject, STORIES)
    told = tokenizer.decode([*prompt, *theirs]).removeprefix(tokenizer.decode(prompt))
    if ours.strip() != told.strip():
        raise SystemExit(f"error: the sides tell other stories in float32: {ours!r} and {told!r}")


def _model(folder: Path, name: str, data: Path) -> Path:
    """The model as a Hugging Face folder, made once."""
    target = folder / name
    if name == STORIES and not target.exists():
        source = data / "model_stories260k"
        files = (source / "stories260K.bin", source / "tok512.bin")
        subprocess.run(python_program("export.cli", "llama2c", *files, "--output", target), check=True)
    return target if name == STORIES else write_decoder(target, LLAMA_1B, packaged_model())


def _package(folder: Path, name: str, model: Path, quantisation: str, threads: int) -> Subject:
    """The model's package with decode programs, made once."""
    package, rows = folder / f"{name}-{quantisation}.package", folder / "rows.jsonl"
    write_full_rows(rows, packaged_model() / "tokenizer.json", 16, 8)
    if not package.exists():
        options = ("--task", "causal_lm", "--with-generation", "--quant", quantisation)
        options = (*options, "--sequence-limit", str(LIMIT))
        subprocess.run(export_command(folder, model, without_labels(rows), package, options), check=True)
    return opened(name, model, package, rows, threads)


def _gguf(folder: Path, name: str, model: Path, kind: str) -> Path:
    """The model as llama.cpp reads it, made once."""
    file = folder / f"{name}-{kind}.gguf"
    if not file.exists():
        run_measured(python_program("benchmarks.inference.write_gguf", model, file, kind))
    return file


def _prompt_ids(subject: Subject, name: str) -> list[int]:
    """Ids of the prompt as the runtime's worker has them: with what the tokenizer puts before a text, not after it."""
    tokenizer = Tokenizer.from_file(str(subject.package / subject.manifest.tokenizer))
    ids: list[int] = tokenizer.encode(PROMPT[name]).ids
    stops = subject.manifest.generation.stop_token_ids if subject.manifest.generation else ()
    while len(ids) > 1 and ids[-1] in stops:
        ids.pop()
    return ids


def _runtime(subject: Subject, name: str, threads: int) -> dict[str, Any]:
    """Seconds of each text from a fresh worker, its peak, and the text."""
    job = InferenceJob(
        package_folder=str(subject.package),
        package_sha256=subject.sha256,
        prepared_folder=str(subject.prepared()),
        state_path=str(subject.package / subject.manifest.initial_state),
        cap_bytes=AMPLE_CAP_BYTES,
        threads=threads,
        sequence_limit=LIMIT,
    )
    request = GenerateText(PROMPT[name], Sampling(max_tokens=TOKENS))
    seconds, text = [], ""
    with InferenceSession.start(job) as session:
        for _ in range(TEXTS):
            *pieces, finished = session.generate(request)
            if not isinstance(finished, Finished) or finished.tokens != TOKENS:
                raise SystemExit(f"error: the text of {name} ended early: {finished}")
            seconds.append(finished.seconds)
            text = "".join(piece.text for piece in pieces if not isinstance(piece, Finished))
        status = Path(f"/proc/{session._worker.process.pid}/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "text": text, "peak_bytes": max(peak, session.ready.load_peak_bytes)}


def _peer(model: Path, subject: Subject, name: str, arguments: Any) -> dict[str, Any]:
    """What the peer's process says, with as many threads as are fastest."""
    counts = sorted({1, arguments.threads})
    found = [_peer_on(threads, model, subject, name, arguments) for threads in counts]
    return min(found, key=lambda each: median(each["seconds"][1:]))


def _peer_on(threads: int, model: Path, subject: Subject, name: str, arguments: Any) -> dict[str, Any]:
    module = arguments.peer.resolve() / "node_modules/node-llama-cpp/dist/index.js"
    script = Path(__file__).with_name("llama_cpp_peer.mjs")
    numbers = [threads, TOKENS, TEXTS, *_prompt_ids(subject, name)]
    command = ["node", str(script), str(module), str(model), *map(str, numbers)]
    found: dict[str, Any] = json.loads(run_measured(command).output.splitlines()[-1])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
