"""What backpropagation reaches with the same slices, for comparison with the demo.

torch trains the float model of the demo's folder. Each round takes the exact gradient over as many rows as a round of
the demo uses, drawn from all devices' rows, and then a step of the demo's own server optimiser. Nothing is sent and
nothing is quantised, so the result is an upper mark rather than another arm of the same run.
"""

from __future__ import annotations

import argparse
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from coordinator.aggregation.server_optimizers import Moments, step
from coordinator.config import ServerOptimizerConfig
from edge_runtime.data.batches import Batch, Tokenizer, draw_batches, load_rows, make_batch
from examples.tinyshakespeare.demo import SEQUENCE_LIMIT, TARGETS
from examples.tinyshakespeare.prepare import HERE, prepare
from export.model.load import is_trainable, load_model
from export.model.slices import SliceOptions

BATCH = 32


def main() -> int:
    """Train, and print dev perplexity as the rounds go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("build/demo-shakespeare/model"))
    parser.add_argument("--data", type=Path, default=Path("build/demo-shakespeare-reference"))
    arguments = parser.parse_args()
    settings = tomllib.loads((HERE / "run.toml").read_text())
    split = prepare(arguments.data)
    tokenizer = Tokenizer(arguments.model / "tokenizer.json", SEQUENCE_LIMIT)
    dev = tokenizer.encode(load_rows(split.dev, ()), at_least=2)
    rows = [ids for path in split.devices for ids in tokenizer.encode(load_rows(path, ()), at_least=2)]

    options = SliceOptions(targets=tuple(TARGETS.split(",")))
    model = load_model(arguments.model, 0, options, "causal_lm").materialise()
    values = {name: p.detach() for name, p in model.named_parameters() if is_trainable(name)}
    server = msgspec.convert(settings["server_optimizer"]["slices"], ServerOptimizerConfig)
    moments = {name: Moments.initial(value.shape, server) for name, value in values.items()}
    print(f"before: {perplexity(model, values, dev):.1f}", flush=True)
    for number in range(settings["rounds"]):
        chosen = draw_batches(
            len(rows),
            seed=settings["seed"],
            round_number=number,
            slot=0,
            steps=settings["devices_per_round"] * settings["steps"],
            batch_size=settings["batch_size"],
        )
        gradient = mean_gradient(model, values, [rows[i] for i in np.concatenate(chosen)])
        for name, value in values.items():
            moved, moments[name] = step(value.numpy(), -gradient[name], moments[name], server)
            values[name] = torch.from_numpy(moved)
        print(f"after round {number}: {perplexity(model, values, dev):.1f}", flush=True)
    return 0


def mean_gradient(
    model: torch.nn.Module, values: Mapping[str, Tensor], rows: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """Mean over rows of the gradient of each row's loss, in float64."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    for batch in _batches(rows):
        _loss(model, leaves, batch).sum().backward()
    return {
        name: leaf.grad.double().numpy() / len(rows) for name, leaf in leaves.items() if leaf.grad is not None
    }


def perplexity(model: torch.nn.Module, values: Mapping[str, Tensor], rows: Sequence[Sequence[int]]) -> float:
    """exp of the mean loss over all predicted tokens."""
    loss, tokens = 0.0, 0
    for batch in _batches(rows):
        with torch.no_grad():
            losses = _loss(model, values, batch)
        loss += float((losses * torch.from_numpy(batch.predicted)).sum())
        tokens += int(batch.predicted.sum())
    return math.exp(loss / tokens)


def _batches(rows: Sequence[Sequence[int]]) -> list[Batch]:
    ordered = sorted(rows, key=len)
    return [
        make_batch(ordered[start : start + BATCH], None, pad_token_id=0)
        for start in range(0, len(ordered), BATCH)
    ]


def _loss(model: torch.nn.Module, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Loss of each row, (B,)."""
    inputs = (batch.input_ids, batch.attention_mask, batch.labels)
    loss: Tensor = functional_call(model, dict(values), tuple(map(torch.from_numpy, inputs)))[0]
    return loss


if __name__ == "__main__":
    raise SystemExit(main())
