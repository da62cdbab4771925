"""A folder's own classifier is trained further only if it computes here what transformers makes of the folder.

The library loads the folder by itself, ``AutoModelForSequenceClassification``, and so does not share a mistake of this
program's reading. Of a large model both sides run the first block alone, so that memory does not grow with the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from edge_runtime.data.batches import make_batch
from export.packaging.self_check import STRICT_LIMIT, WHOLE_BYTES, torch_inputs
from export.packaging.torch_reference import TorchReference
from export.quantisation.stored import StoredModel

BYTES_PER_FLOAT = 4


def why_head_differs(
    folder: Path,
    stored: StoredModel,
    rows: tuple[int, ...],
    ids: list[list[int]],
    *,
    parameters: int,
    trust_remote_code: bool,
) -> str | None:
    """Compare logits of the captured float model, with the folder's own classifier, with the library's.

    Args:
        folder: model folder.
        stored: captured model; its slices are at their start, where they change nothing.
        rows: rows of the folder's classifier in the order of the labels.
        ids: tokens of each text.
        parameters: number of parameters of the model.
        trust_remote_code: whether Python code of the folder's own may run.

    Returns:
        None if they agree, else the reason.
    """
    whole = parameters * BYTES_PER_FLOAT <= WHOLE_BYTES
    segments = stored.plain if whole else (*stored.plain[:2], stored.plain[-1])
    batch = torch_inputs(make_batch(ids, [0] * len(ids), pad_token_id=0))
    ours = TorchReference(segments, stored.tensors).run(batch)["logits"]
    try:
        theirs = _library_logits(folder, ids, None if whole else 1, trust_remote_code)[:, list(rows)]
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower for folders that it cannot load or run
        return f"transformers cannot run it: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if difference < STRICT_LIMIT:
        return None
    return f"its logits here differ from transformers' by {difference:.1e}, limit {STRICT_LIMIT:.0e}"


def _library_logits(
    folder: Path, ids: list[list[int]], blocks: int | None, trust_remote_code: bool
) -> Tensor:
    """Logits (B, C) of the model as the library loads it, row by row and so without padding."""
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **given)
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:blocks]
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", **given
    ).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ids])
