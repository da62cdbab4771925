"""A head in closed form: a ridge classifier solved from the sums of all devices (:mod:`..feature_sums` of the device).

With features standardised by the fleet's own first and second moments, X (n rows, D features; a feature that is the
same in all rows is left out), and one-hot labels Y, the scores are X W with

    W = (XᵀX + λI)⁻¹ XᵀY.

Rows enter through sums alone, so their order and how they were shared out cannot matter (Zhuang et al. 2024, "AFL",
arXiv 2405.16240). Class shares are not added to the scores as an intercept would: they favour frequent classes, and
accuracy was better without them wherever shares were unequal (docs/decisions/0022-closed-form.md).

λ is the one on a grid that has the least generalised cross-validation error (Golub, Heath & Wahba 1979, "Generalized
cross-validation as a method for choosing a good ridge parameter", formula 1.4), with R the residuals and H the hat
matrix:

    GCV(λ) = (|R|² / n) / (1 - tr H / n)²

All of it follows from the sums: |R|² = |Y|² - tr WᵀXᵀY - λ|W|², tr H = D - λ tr (XᵀX + λI)⁻¹, whose trace is estimated
with random signs (Hutchinson 1990).

Scores are turned into logits by one factor. A ridge regression on one-hot labels models the probability m of a row's
own class on average, which GCV corrects for having seen the row. The factor is twice the one at which a row with score
m for its own class and equal scores for the others has the log-odds of m: twice, since rows differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.server_state import ServerState
from coordinator.aggregation.server_step import ServerUpdate
from edge_runtime.errors import SliceError
from edge_runtime.package.slices import FloatArray, Values, key
from edge_runtime.training.feature_sums import FeatureSums
from edge_runtime.training.projection import Projection

DoubleArray = NDArray[np.float64]
#: Ridges that are tried, relative to the number of rows.
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
#: Where on the grid the search starts if no earlier round has found one: with more rows than features, and with fewer.
START, START_FEW = 3, 6
#: Least share of the rows that must be left beyond the fit's degrees of freedom. A fit that all but passes through its
#: rows has hardly any residual to judge it by.
LEAST_LEFT = 0.2
#: Random sign vectors for the trace, and their seed.
PROBES, PROBE_SEED = 32, 0x5249_4447
#: Standard deviation, relative to the root mean square, below which a feature counts as constant.
CONSTANT = 1e-5
MOST_SCALE = 1e4
#: How far below 1 the correlation of two features may be that count as one over again.
ALIKE = 1e-4


@dataclass(frozen=True)
class ClosedForm:
    """A head as it was solved.

    Attributes:
        weight: float32 (C, D).
        bias: float32 (C,).
        ridge: λ relative to the number of rows.
        rows: number of rows that it was solved from.
        error: GCV error, the mean square of a row's residual, had the row not been seen.
        scale: factor between scores and logits.
        constant: number of features left out because they are the same in all rows.
        repeated: number of features that are another one over again, up to sign and scale; they share its weight. Not
            counted where there are no more rows than features, since any two may look alike then.
        absent: indices of the classes that no row has; their logits are constant.
    """

    weight: FloatArray
    bias: FloatArray
    ridge: float
    rows: int
    error: float
    scale: float
    constant: int
    repeated: int
    absent: tuple[int, ...]


def add_up(sums: FeatureSums | None, more: Iterable[FeatureSums]) -> FeatureSums | None:
    """The sums with those of more devices; None if there are none at all."""
    for each in more:
        sums = each if sums is None else sums.plus(each)
    return sums


def solve(sums: FeatureSums, ridge: float | None = None, start: float | None = None) -> ClosedForm:
    """The head of some sums.

    Args:
        sums: sums over any number of rows; of none, since all were taken off again, the head is zero.
        ridge: λ relative to the number of rows; None chooses it on :data:`GRID`.
        start: ridge from which the choice starts, such as that of the round before; None starts in the middle.
    """
    if sums.rows == 0:
        return _of_no_rows(sums, ridge)
    standard = _standardise(sums)
    if ridge is not None:
        best = _fit(standard, ridge)
    else:
        middle = START if sums.rows > len(standard.mean) else START_FEW
        best = _search(standard, GRID.index(start) if start in GRID else middle)
    scale = _scale(standard, best)
    weight = (best.solution * standard.inverse[:, None]).T * scale
    return ClosedForm(
        weight=weight.astype(np.float32),
        bias=(-weight @ standard.mean).astype(np.float32),
        ridge=best.ridge,
        rows=sums.rows,
        error=best.error,
        scale=scale,
        constant=int((standard.inverse == 0).sum()),
        repeated=_repeated(standard),
        absent=tuple(int(index) for index in np.flatnonzero(sums.counts == 0)),
    )


def _of_no_rows(sums: FeatureSums, ridge: float | None) -> ClosedForm:
    """A head that tells nothing: what the formula gives where XᵀY is zero."""
    width, classes = len(sums.gram), len(sums.counts)
    return ClosedForm(
        weight=np.zeros((classes, width), np.float32),
        bias=np.zeros(classes, np.float32),
        ridge=GRID[START_FEW] if ridge is None else ridge,
        rows=0,
        error=0.0,
        scale=1.0,
        constant=width,
        repeated=0,
        absent=tuple(range(classes)),
    )


@dataclass(frozen=True)
class _Standard:
    """Sums of standardised features.

    Attributes:
        rows: number of rows.
        mean: mean of each feature, (D,).
        inverse: inverse of each standard deviation, (D,); 0 for a constant feature.
        gram: XᵀX, (D, D).
        moments: XᵀY, (D, C).
        labels_squared: |Y|² about its mean.
        classes: number of classes that have rows.
        probes: random signs (D, :data:`PROBES`) by which traces are estimated, the same for every ridge.
    """

    rows: int
    mean: DoubleArray
    inverse: DoubleArray
    gram: DoubleArray
    moments: DoubleArray
    labels_squared: float
    classes: int
    probes: DoubleArray


@dataclass(frozen=True)
class _Fit:
    """A solution W (D, C) for one ridge, with its GCV error."""

    ridge: float
    solution: DoubleArray
    error: float


def _standardise(sums: FeatureSums) -> _Standard:
    rows = sums.rows
    mean = sums.linear[:, 0] / rows
    square = np.diagonal(sums.gram) / rows
    deviation = np.sqrt(np.maximum(square - mean * mean, 0))
    constant = deviation <= CONSTANT * np.sqrt(square)
    inverse = np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation))
    gram = (sums.gram - rows * np.outer(mean, mean)) * np.outer(inverse, inverse)
    moments = (sums.linear[:, 1:] - np.outer(mean, sums.counts)) * inverse[:, None]
    squared = rows - float((sums.counts**2).sum()) / rows
    generator = np.random.Generator(np.random.PCG64(PROBE_SEED))
    probes = generator.choice([-1.0, 1.0], (len(mean), PROBES))
    return _Standard(rows, mean, inverse, gram, moments, squared, int((sums.counts > 0).sum()), probes)


def _repeated(standard: _Standard) -> int:
    """Number of features that correlate all but wholly with one before them."""
    if standard.rows <= len(standard.mean):
        return 0
    alike = np.abs(standard.gram) > (1 - ALIKE) * standard.rows
    return int(np.triu(alike, 1).any(axis=0).sum())


def _search(standard: _Standard, start: int) -> _Fit:
    """Descend on the grid from a starting point, on the assumption that the error has one valley."""
    fits = {start: _fit(standard, GRID[start])}
    at = start
    while True:
        for near in (at - 1, at + 1):
            if 0 <= near < len(GRID) and near not in fits:
                fits[near] = _fit(standard, GRID[near])
        best = min((i for i in (at, at - 1, at + 1) if i in fits), key=lambda i: (fits[i].error, i != at))
        if best == at:
            return fits[at]
        at = best


def _fit(standard: _Standard, ridge: float) -> _Fit:
    rows, width = standard.rows, len(standard.mean)
    damping = ridge * rows
    damped = standard.gram.copy()
    damped.flat[:: width + 1] += damping
    solved = np.linalg.solve(damped, np.concatenate([standard.moments, standard.probes], axis=1))
    solution, inverse = solved[:, :-PROBES], solved[:, -PROBES:]
    residual = (
        standard.labels_squared
        - float((solution * standard.moments).sum())
        - damping * float((solution * solution).sum())
    )
    trace = 1 + width - damping * float((standard.probes * inverse).sum()) / PROBES
    left = 1 - trace / rows
    error = max(residual, 0.0) / rows / left**2 if left >= LEAST_LEFT else math.inf
    return _Fit(ridge, solution, error)


def _scale(standard: _Standard, fit: _Fit) -> float:
    """The factor between scores and logits; 1 where the features tell nothing."""
    rows, classes = standard.rows, standard.classes
    if classes < 2 or not math.isfinite(fit.error):
        return 1.0
    # With class shares as intercepts, |score|² is |p|² + |X W|² on average.
    shares = 1 - standard.labels_squared / rows
    explained = float((fit.solution * standard.moments).sum() - fit.ridge * rows * (fit.solution**2).sum())
    own = (1 + shares + explained / rows - fit.error) / 2
    own = min(max(own, 1 / classes), 1 - 1e-3)
    others = (1 - own) / (classes - 1)
    if own - others < 1e-3:
        return 1.0
    return min(2 * math.log(own / others) / (own - others), MOST_SCALE)


def visit_update(
    values: Values,
    state: ServerState,
    more: Iterable[FeatureSums],
    *,
    head: str,
    ridge: float | None,
    projection: Projection | None = None,
    possible: Callable[[FeatureSums], FeatureSums] = lambda sums: sums,
) -> tuple[ServerUpdate, ClosedForm] | None:
    """From a visit's sums so far and those of a round to the values with a new head.

    Args:
        values: slice values that the round's tasks came with; not modified.
        state: server state that the round before left; not modified.
        more: what the round's results change in the sums, in the order of their slots; consumed one at a time.
        head: name of the head's slice.
        ridge: ridge that the run asks for; None chooses it.
        projection: random projection of the features that the sums are of; None if they are of the features.
        possible: what is made of sums before a head is solved from them, where noise makes them such as no rows have.

    Returns:
        The update, and the head as it was solved; None if there are no sums.

    Raises:
        SliceError: the sums give no head of finite numbers, so some are of no rows that could be.
    """
    sums = add_up(state.sums, more)
    if sums is None:
        return None
    try:
        solved = solve(possible(sums), ridge, state.ridge)
    except np.linalg.LinAlgError as error:
        raise SliceError(f"the sums give no head: {error}") from error
    if not (np.isfinite(solved.weight).all() and np.isfinite(solved.bias).all()):
        raise SliceError("the sums give a head that is not finite")
    weight = solved.weight if projection is None else projection.back(solved.weight)
    new = {**values, key(head, "weight"): weight, key(head, "bias"): solved.bias}
    after = replace(state, sums=sums, ridge=solved.ridge)
    return ServerUpdate(new, after, average=None, reference=None, gated_variance=None), solved
