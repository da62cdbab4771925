"""Record the tangents of one step for each kind of directions.

    python -m tests.edge_runtime.golden.tangents

writes ``tangents.json`` beside this file: for each case the entries of every slice in order of draw, example and
entry; signs as 0 and 1, dealt ones as -, 0 and +, normal entries as whole multiples of their grain. They are part of
the protocol (a server replays them), so they never change.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.package.slices import shapes
from edge_runtime.protocol.messages import LocalOptimizer, Task
from edge_runtime.training.tangents import GRAIN, draw_tangents

FILE = Path(__file__).with_name("tangents.json")
STEP, EXAMPLES = 3, (0, 5)
#: The second slice has two tensors, and more entries than one random word.
SPECS = (
    SliceSpec("block0.query", "lora_xs", (1,), "query", (TensorSpec("core", (1, 4, 4), "core"),)),
    SliceSpec(
        "block1.value",
        "lora",
        (2,),
        "value",
        (TensorSpec("A", (1, 3, 20), "A"), TensorSpec("B", (1, 7, 3), "B")),
    ),
)
TASK = Task(
    task_id="t-1",
    run_id="r-1",
    round=2,
    slot=7,
    seed=2**63 - 25,
    package="0" * 64,
    package_signature="A" * 86 + "==",
    state="0" * 64,
    slices=tuple(spec.name for spec in SPECS),
    train_head=False,
    steps=4,
    batch_size=6,
    draws=3,
    sequence_limit=8,
    optimizer=LocalOptimizer(),
    required_bytes=0,
    deadline_s=0,
)
#: What filtered directions are compared with.
REFERENCE = {
    name: (np.arange(int(np.prod(shape)), dtype=np.float32) % 7 - 3).reshape(shape)
    for name, shape in shapes(SPECS).items()
}


def recording() -> dict[str, dict[str, str]]:
    """Entries by kind of directions and tensor."""
    made = {}
    for directions in ("per_example", "shared", "orthogonal", "gaussian", "filtered"):
        task = replace(TASK, directions=directions, candidates=4)
        tangents = draw_tangents(task, SPECS, STEP, EXAMPLES, REFERENCE)
        written = grains if directions in ("gaussian", "filtered") else bits
        made[directions] = {name: written(tangent) for name, tangent in tangents.items()}
    # Several steps: the first slice's turns run over the end of a deck, the second's rows are cut.
    dealt = replace(TASK, directions="dealt", draws=8)
    steps = [draw_tangents(dealt, SPECS, step, EXAMPLES) for step in range(TASK.steps)]
    made["dealt"] = {name: signs_or_none(np.stack([step[name] for step in steps])) for name in steps[0]}
    return made


def bits(tangent: np.ndarray) -> str:
    """Signs as 0 and 1."""
    return "".join("01"[int(v > 0)] for v in np.ravel(tangent))


def signs_or_none(tangent: np.ndarray) -> str:
    """Entries of a slice that moves as signs, those of one that does not as zeros."""
    return "".join("-0+"[int(np.sign(v)) + 1] for v in np.ravel(tangent))


def grains(tangent: np.ndarray) -> str:
    """Normal entries as multiples of their grain."""
    return " ".join(str(int(v / GRAIN)) for v in np.ravel(tangent))


if __name__ == "__main__":
    FILE.write_text(json.dumps(recording(), indent=1) + "\n")
    print(FILE)
