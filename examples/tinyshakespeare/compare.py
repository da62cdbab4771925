"""What the adapter is worth to somebody who loads it with ``peft`` into the float model."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

from edge_runtime.data.batches import Tokenizer, load_rows, make_batch
from export.lowering.quiet import quiet

with quiet():
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

BATCH = 32
logging.disable_progress_bar()


def perplexity_of_adapter(model: Path, adapter: Path, dev: Path, sequence_limit: int) -> float:
    """Perplexity of a token of the dev rows, counted as the coordinator counts it.

    Args:
        model: Hugging Face folder of the float base.
        adapter: adapter folder that ``edge-export adapter`` wrote.
        dev: rows to predict.
        sequence_limit: longest sequence, in tokens.
    """
    base = AutoModelForCausalLM.from_pretrained(model, local_files_only=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers has renamed
        adapted = PeftModel.from_pretrained(base, str(adapter))
    ids = Tokenizer(adapter / "tokenizer.json", sequence_limit).encode(load_rows(dev, ()), at_least=2)
    ids.sort(key=len)
    loss, tokens = 0.0, 0
    for start in range(0, len(ids), BATCH):
        batch = make_batch(ids[start : start + BATCH], None, pad_token_id=0)
        labels = torch.from_numpy(batch.labels)
        with torch.no_grad():
            logits = adapted(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
            ).logits
        loss += float(
            nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1, reduction="sum")
        )
        tokens += int(batch.predicted.sum())
    return math.exp(loss / tokens)
