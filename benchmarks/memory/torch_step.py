"""Child program: LoRA steps by PyTorch, Transformers and peft, the usual way to fine-tune.

Reads its settings as JSON from standard input and writes its peak and the seconds of every step as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Fine-tune for some steps."""
    settings: dict[str, Any] = json.load(sys.stdin)
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], local_files_only=True)
    labels: list[str] = json.loads(Path(settings["labels"]).read_text())
    rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()]
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        settings["model"], num_labels=len(labels), local_files_only=True
    )
    adapter = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=4, target_modules=["query", "value"])
    model = get_peft_model(model, adapter)
    if settings["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model.train()

    seconds = []
    size = settings["batch_size"]
    micro_batch = settings["micro_batch"]
    for step in range(settings["steps"]):
        started = time.perf_counter()
        optimizer.zero_grad()
        for first in range(0, size, micro_batch):
            chosen = [rows[(step * size + first + i) % len(rows)] for i in range(micro_batch)]
            batch = tokenizer(
                [row["text"] for row in chosen],
                truncation=True,
                max_length=settings["tokens"],
                padding=True,
                return_tensors="pt",
            )
            answers = torch.tensor([labels.index(row["label"]) for row in chosen])
            (model(**batch, labels=answers).loss * (micro_batch / size)).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    if tuple(batch["input_ids"].shape) != (micro_batch, settings["tokens"]):
        found = tuple(batch["input_ids"].shape)
        raise SystemExit(f"the batch is {found}, not {micro_batch} x {settings['tokens']}")
    json.dump({"high_water_bytes": _high_water_bytes(), "seconds": seconds}, sys.stdout)


def _high_water_bytes() -> int:
    from edge_runtime.memory.meter import status_bytes

    return status_bytes("VmHWM")


if __name__ == "__main__":
    main()
