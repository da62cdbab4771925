"""Rows chosen anew: what becomes of a ``rows`` slice when others of its rows are to be trained (GRASS).

Muhamed et al. 2024, "Grass: Compute Efficient Low-Memory LLM Training with Structured Sparse Gradients", EMNLP, arXiv
2406.17660, section 3. The weight (m, n) of a layer moves by Pᵀ·R: P (r, m) picks rows, R (r, n) are the
slice's trained ``rows``, and Pᵀ is its ``place`` (1, m, r). An optimiser's state is of R's size. Column j of Pᵀ is a
scale at one row, the paper's rho at sigma_j:

* ``topk``: the r rows of highest score, at scale 1;
* ``norm``: rows i drawn with probabilities q in proportion to their norms, at scale 1/√(r q_i), so that E[PᵀP] = I and
  the step Pᵀ·(P·G) has the mean G of a step by the whole gradient G;
* ``uniform``: the same with q = 1/m.

With q in proportion to squared norms the error would be exactly that of a uniform choice, so norms it is.

The paper scores rows by the gradient itself at the moment of choice. Devices that run forward mode have the gradient of
chosen rows alone, with noise: the score here, a stand-in, is a moving mean of the squared norm that a row's part of
the round's mean change had, its scale taken off, while it was chosen. A row that never was has the mean of those
that were; before the first round all are alike.

When rows are chosen, ``moved`` takes up Pᵀ·R, R starts again at zero and the server's optimiser with it, since its
state is of other rows: the function stays what it was, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from coordinator.aggregation.server_optimizers import DoubleArray, Moments
from coordinator.config import RowChoice
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import FloatArray, Values, key
from edge_runtime.training.tangents import philox_key, random_words

#: Kind of the slices that this is about.
KIND = "rows"
#: Share of a score that a round keeps.
KEPT = 0.9
#: Scores (m,) of each slice's rows, by the slice's name; NaN for a row that was never chosen.
Scores = Mapping[str, DoubleArray]


def measured(
    scores: Scores, deltas: Mapping[str, DoubleArray], values: Values, specs: Iterable[SliceSpec]
) -> dict[str, DoubleArray]:
    """The scores after a round.

    Args:
        scores: scores before it; a slice without has none of its rows scored.
        deltas: the round's mean deltas by flat name.
        values: values that the round's tasks came with.
        specs: all slices of the package.
    """
    result = dict(scores)
    for name in (spec.name for spec in specs if spec.kind == KIND and key(spec.name, "rows") in deltas):
        place = values[key(name, "place")][0].astype(np.float64)
        squares = np.square(deltas[key(name, "rows")][0]).sum(axis=1)
        picked, scale = np.abs(place).argmax(axis=0), np.abs(place).max(axis=0)
        old = np.array(result.get(name, np.full(len(place), np.nan)))
        for row in np.unique(picked):
            found = (squares[picked == row] / scale[picked == row] ** 2).mean()
            old[row] = found if np.isnan(old[row]) else KEPT * old[row] + (1 - KEPT) * found
        result[name] = old
    return result


def folded(values: Values, specs: Iterable[SliceSpec]) -> Values:
    """The same function with all rows at zero, and what they had moved by in ``moved``."""
    result = dict(values)
    for name in (spec.name for spec in specs if spec.kind == KIND):
        rows, place = values[key(name, "rows")], values[key(name, "place")]
        if rows.any():
            whole = place[0].astype(np.float64) @ rows[0].astype(np.float64)
            total = values[key(name, "moved")].astype(np.float64)
            # Rows that were never chosen are not touched, not even by a zero of the other sign.
            chosen = place[0].any(axis=1)
            total[0, chosen] += whole[chosen]
            result[key(name, "moved")] = total.astype(np.float32)
            result[key(name, "rows")] = np.zeros_like(rows)
    return result


def chosen_anew(
    values: Values,
    moments: Mapping[str, Moments],
    scores: Scores,
    specs: Iterable[SliceSpec],
    *,
    choice: RowChoice,
    seed: int,
    committed: int,
) -> tuple[Values, dict[str, Moments]]:
    """Values whose ``rows`` slices train other rows, and the optimiser's state that goes with them.

    The choice depends on nothing but scores, seed and number: whoever makes it again makes the same.

    Args:
        values: values by flat name.
        moments: the server's optimiser state by flat name.
        scores: scores of the rows.
        specs: all slices of the package.
        choice: how rows are chosen.
        seed: seed of the run.
        committed: number of rounds that were committed.
    """
    specs = list(specs)
    result, kept = folded(values, specs), dict(moments)
    for name in (spec.name for spec in specs if spec.kind == KIND):
        _, rows, count = values[key(name, "place")].shape
        words = random_words(philox_key(seed, committed, 0, f"rows/{name}"), 0, 0, 0, count)
        draws = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        found = np.array(scores.get(name, np.full(rows, np.nan)))
        result[key(name, "place")] = placed(found, choice, draws)
        kept.pop(key(name, "rows"), None)
    return result, kept


def placed(scores: DoubleArray, choice: RowChoice, draws: DoubleArray) -> FloatArray:
    """Pᵀ as ``place`` (1, m, r).

    Args:
        scores: squared norms (m,); NaN where unknown.
        choice: how rows are chosen.
        draws: r uniform numbers from [0, 1).
    """
    rows, count = len(scores), len(draws)
    known = scores[~np.isnan(scores)]
    filled = np.where(np.isnan(scores), known.mean() if len(known) else 1.0, scores)
    if choice == "topk":
        # Of equals those by draw, so that rows that nobody knows are not always the first.
        start = int(draws[0] * rows)
        turned = (np.arange(rows) - start) % rows
        picked, scale = np.sort(np.lexsort((turned, -filled))[:count]), np.ones(count)
    else:
        norms = np.sqrt(filled) if choice == "norm" else np.ones(rows)
        chances = norms / norms.sum() if norms.sum() > 0 else np.full(rows, 1 / rows)
        # Rounding may leave the last of the sums below a draw.
        last = np.flatnonzero(chances)[-1]
        picked = np.minimum(np.searchsorted(np.cumsum(chances), draws, side="right"), last)
        scale = 1 / np.sqrt(count * chances[picked])
    place: FloatArray = np.zeros((1, rows, count), np.float32)
    place[0, picked, np.arange(count)] = scale
    return place
