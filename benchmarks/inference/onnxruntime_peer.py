"""The peer of ``make bench-predict``: a classifier on plain ONNX Runtime, as people build one by hand.

It reads its text, tokenises, runs one session with default options and takes a softmax: what the runtime's worker does
for a request. It loads numpy, onnxruntime and tokenizers, and nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def main() -> int:
    """Answer one text many times; print seconds and memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--no-spinning", action="store_true", help="threads that wait sleep")
    parser.add_argument("--requests", type=int, required=True)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    tokenizer.enable_truncation(max_length=arguments.tokens)
    tokenizer.no_padding()
    options = ort.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    if arguments.no_spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(arguments.model), options, providers=["CPUExecutionProvider"])
    seconds, processor_s = [], time.process_time()
    for _ in range(arguments.requests):
        started = time.perf_counter()
        ids = np.array([tokenizer.encode(arguments.text).ids], np.int64)
        (logits,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        shares = np.exp(logits[0] - logits[0].max())
        shares /= shares.sum()
        seconds.append(time.perf_counter() - started)
    processor_s = (time.process_time() - processor_s) / arguments.requests
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    warm = seconds[len(seconds) // 4 :]
    measured = {
        "seconds": median(warm),
        "processor_s": processor_s,
        "peak_bytes": peak,
        "tokens": ids.shape[1],
    }
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
