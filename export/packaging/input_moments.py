"""What enters the layers that get slices: second moments over the rows of ``--check-data``, by the float model.

LoRA-XS's factors can be made of them (:func:`export.slices.lora_xs.whitened_factors`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from edge_runtime.data.examples import group_by_length
from edge_runtime.errors import ModelError
from export.packaging.mask_scores import Scoring, float_model
from export.packaging.programs import Progress

#: First rows that are looked at, and how many run at a time.
ROWS, BATCH = 64, 8


def input_moments(scoring: Scoring, progress: Progress) -> dict[str, Tensor]:
    """Mean of x xᵀ, (in, in) in float64, over the tokens of the first rows, for each target by its name in the model.

    Args:
        scoring: model, rows and targets; labels play no part.
        progress: called with a sentence as the stage begins.

    Raises:
        ModelError: what enters a layer is not finite.
    """
    model, layers, examples = float_model(replace(scoring, rows=scoring.rows[:ROWS]))
    model.eval()
    progress(f"Looking at what enters {len(layers)} layers on {len(examples.ids)} rows")
    sums = {
        name: torch.zeros(layer.linear.in_features, layer.linear.in_features, dtype=torch.float64)
        for name, layer in layers.items()
    }
    tokens, real = 0, torch.empty(0)

    def add(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        del layer
        entering = given[0][real].double()
        sums[name] += entering.T @ entering

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    with torch.no_grad():
        for group in group_by_length(examples.ids, BATCH):
            batch = examples.batch(group)
            real = torch.from_numpy(batch.attention_mask) == 1
            tokens += int(real.sum())
            labels = batch.labels.clip(0)  # the loss is of no use here, and rows may have no label
            model(*map(torch.from_numpy, (batch.input_ids, batch.attention_mask, labels)))
    for hook in hooks:
        hook.remove()
    moments = {name: total / tokens for name, total in sums.items()}
    for name, moment in moments.items():
        if not bool(torch.isfinite(moment).all()):
            raise ModelError(f"--factors inputs: what enters {name} is not finite; take --factors weight")
    return moments
