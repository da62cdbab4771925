"""The hand-written language model of :mod:`tests.edge_runtime.bigram` with a slice of two of its six rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.package.slices import Values, key
from edge_runtime.protocol.signing import PrivateKey
from tests.edge_runtime.bigram import HIDDEN, SLICE, Bigram
from tests.edge_runtime.ranked_bigram import write_with_slice

COUNT = 2
ROWS, PLACE, MOVED = key(SLICE, "rows"), key(SLICE, "place"), key(SLICE, "moved")
SPEC = SliceSpec(
    SLICE,
    "rows",
    (1,),
    "mix",
    (
        TensorSpec("rows", (1, COUNT, HIDDEN), "rows"),
        TensorSpec("place", (1, HIDDEN, COUNT), "place"),
        TensorSpec("moved", (1, HIDDEN, HIDDEN), "moved"),
    ),
)
BODY = """
{ rows_t = Transpose<perm = [0, 2, 1]>(rows)
  place_t = Transpose<perm = [0, 2, 1]>(place)
  moved_t = Transpose<perm = [0, 2, 1]>(moved)
  inner = MatMul(hidden, rows_t)
  now = MatMul(inner, place_t)
  before = MatMul(hidden, moved_t)
  mixed = Add(now, before)
  hidden_out = Add(hidden, mixed)
"""
INPUTS = "float[B,T,6] hidden, float[1,2,6] rows, float[1,6,2] place, float[1,6,6] moved"
PROGRAMS = {
    "block": f"\nblock ({INPUTS}) => (float[B,T,6] hidden_out)\n{BODY} }}\n",
    "block_entry": f"""
block_entry ({INPUTS}, float[K,B,2,6] rows_dot) => (float[B,T,6] hidden_out, float[K,B,T,6] hidden_dot_out)
{BODY}
  rows_dot_t = Transpose<perm = [0, 1, 3, 2]>(rows_dot)
  inner_dot = MatMul(hidden, rows_dot_t)
  hidden_dot_out = MatMul(inner_dot, place_t) }}
""",
}


def start_values() -> Values:
    """The first two rows, and nothing moved."""
    place = np.zeros((1, HIDDEN, COUNT), np.float32)
    place[0, range(COUNT), range(COUNT)] = 1
    return {
        ROWS: np.zeros((1, COUNT, HIDDEN), np.float32),
        PLACE: place,
        MOVED: np.zeros((1, HIDDEN, HIDDEN), np.float32),
    }


def write_rows_bigram(folder: Path, signer: PrivateKey) -> Bigram:
    """Write the package into ``folder``, signed."""
    return write_with_slice(folder, signer, PROGRAMS, SPEC, start_values())
