"""Sums over a device's rows from which a head is solved in closed form, and how they travel.

With features F (n rows, width D), a column of ones, and the one-hot labels Y of the classes that are there, a ridge
classifier needs FᵀF, Fᵀ[1 Y] and the counts: sums over rows, so one pass makes them, and those of all devices add up to
what one device with all rows would have (analytic federated learning: Zhuang et al. 2024, arXiv 2405.16240; FED3R:
Fanì et al. 2024, arXiv 2406.01116).

They travel in the shorter of two forms. *Grams*: the blocks on and above the diagonal of FᵀF, since it is symmetric.
*Rows*, where these are few: Qᵀ[F 1 Y] for the orthogonal Q of a QR decomposition of its first n columns; the product
of it with itself is the same. Neither form says which row had which label or text beyond what the sums say.

Every block's features have root mean square 1 (:mod:`edge_runtime.package.block_head`), so no row adds more than their
number to the trace of FᵀF: sums can be checked against the number of rows that they are said to be of. That holds for
random projections of them too (:mod:`edge_runtime.training.projection`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_runtime.errors import PackageError, SliceError
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.slices import FloatArray, Values
from edge_runtime.protocol.messages import TrainingSettings
from edge_runtime.training.methods import PROJECTED_BLOCK

DoubleArray = NDArray[np.float64]
PREFIX = "sums/"
CLASSES, ROWS, COUNTS, LINEAR = (PREFIX + name for name in ("classes", "rows", "counts", "linear"))
#: Fewer rows than this share of the width travel as rows: there they are shorter, and take less memory to make.
FEW_ROWS = 1 / 3
#: What a tensor's name, type and place take in the head of a file, at most.
HEADER_BYTES = 128
#: What rounding to integers may add to a count of rows.
MASKED_ROUNDING = 1e-3
#: What rounding may add to a sum, relative to it, by the precision that it travelled in.
ROUNDING = {"float32": 1e-3, "float16": 2e-2}


@dataclass(frozen=True)
class SumsForm:
    """What the sums of a run are of, and how they travel.

    Attributes:
        width: number D of a row's features, or of their projections.
        size: number of them in one block of the Gram matrix, of which there are (D / size)².
        square: largest squared length that they may have.
        labels: number of the package's labels.
        dtype: precision that they travel in.
    """

    width: int
    size: int
    square: int
    labels: int
    dtype: str

    def most_bytes(self, rows: int) -> int:
        """Size that the encoded sums of so many rows do not exceed, of whatever classes."""
        if rows >= self.width * FEW_ROWS:
            return self.whole_bytes
        beside = 1 + min(self.labels, rows)
        return rows * (self.width + beside) * np.dtype(self.dtype).itemsize + 4 * beside + 4 * HEADER_BYTES

    @property
    def whole_bytes(self) -> int:
        """Size that encoded sums do not exceed, of however many rows."""
        blocks, beside, item = self.width // self.size, 1 + self.labels, np.dtype(self.dtype).itemsize
        pairs = blocks * (blocks + 1) // 2
        grams = pairs * (self.size**2 * item + HEADER_BYTES) + self.width * beside * item + 8 * beside
        few = int(self.width * FEW_ROWS) * (self.width + beside) * item + 4 * beside
        return max(grams, few) + 4 * HEADER_BYTES


def form_of(settings: TrainingSettings, manifest: Manifest) -> SumsForm:
    """The form of a run's sums.

    Args:
        settings: settings of the run or of a task.
        manifest: the package's manifest, as the run sees it.

    Raises:
        PackageError: the run's head reads the package's own features.
    """
    if not manifest.head_blocks:
        raise PackageError(f"package {manifest.name} has no head over blocks; name blocks in features")
    size, labels = manifest.base.hidden_size, len(manifest.labels)
    width, kept = size * len(manifest.head_blocks), settings.sums_projection
    if kept:
        return SumsForm(kept, PROJECTED_BLOCK, width, labels, settings.sums_dtype)
    return SumsForm(width, size, width, labels, settings.sums_dtype)


@dataclass(frozen=True)
class FeatureSums:
    """Sums over rows of features, in double precision.

    Attributes:
        rows: number of rows.
        gram: sum of f fᵀ, (D, D).
        linear: sum of f, and of f over the rows of each class, (D, 1 + C).
        counts: number of rows of each class, (C,).
    """

    rows: int
    gram: DoubleArray
    linear: DoubleArray
    counts: DoubleArray

    @classmethod
    def nothing(cls, width: int, classes: int) -> FeatureSums:
        """The sums over no row."""
        return cls(0, np.zeros((width, width)), np.zeros((width, 1 + classes)), np.zeros(classes))

    def plus(self, other: FeatureSums) -> FeatureSums:
        """The sums over the rows of both."""
        return FeatureSums(
            self.rows + other.rows,
            self.gram + other.gram,
            self.linear + other.linear,
            self.counts + other.counts,
        )

    def with_labels(self, labels: int) -> FeatureSums:
        """The same sums in a package that has more labels behind those it had; no row is of a new one."""
        more = labels - len(self.counts)
        return FeatureSums(
            self.rows,
            self.gram,
            np.pad(self.linear, ((0, 0), (0, more))),
            np.pad(self.counts, (0, more)),
        )

    def minus(self, other: FeatureSums) -> FeatureSums:
        """The sums without some rows that are among them."""
        return FeatureSums(
            self.rows - other.rows,
            self.gram - other.gram,
            self.linear - other.linear,
            self.counts - other.counts,
        )


class SumsBuilder:
    """Adds up features batch by batch.

    Args:
        width: number D of a row's features.
        size: number of features of one block, of which there are D / size.
        labels: label index of every row that will be added.
    """

    def __init__(self, width: int, size: int, labels: FloatArray | NDArray[np.int64]) -> None:
        self._width, self._size = width, size
        self._classes = np.unique(labels)
        self.rows = 0
        self._few = len(labels) < width * FEW_ROWS
        wide = 1 + len(self._classes)
        if self._few:
            self._kept = np.zeros((len(labels), width + wide), np.float32)
        else:
            starts = range(0, width, size)
            self._grams = {
                (i, j): np.zeros((size, size), np.float32) for i in starts for j in starts if j >= i
            }
            self._linear, self._counts = np.zeros((width, wide), np.float32), np.zeros(wide, np.float64)

    def add(self, features: FloatArray, labels: NDArray[np.int64]) -> None:
        """Add features (b, D) of rows with these labels (b,)."""
        beside = np.ones((len(labels), 1 + len(self._classes)), np.float32)
        beside[:, 1:] = labels[:, None] == self._classes
        if self._few:
            self._kept[self.rows : self.rows + len(labels)] = np.concatenate([features, beside], axis=1)
        else:
            size = self._size
            for i, j in self._grams:
                self._grams[i, j] += features[:, i : i + size].T @ features[:, j : j + size]
            self._linear += features.T @ beside
            self._counts += beside.sum(axis=0, dtype=np.float64)
        self.rows += len(labels)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that was added so far, by name, but for the number of rows."""
        if self._few:
            return {"kept": self._kept}
        grams = {f"gram/{i}/{j}": gram for (i, j), gram in self._grams.items()}
        return {**grams, "linear": self._linear, "counts": self._counts}

    def restore(self, state: Mapping[str, NDArray[Any]], rows: int) -> None:
        """Go on from a state that :meth:`state` gave after so many rows.

        Raises:
            KeyError: a part of it is missing.
        """
        self.rows = rows
        if self._few:
            self._kept = state["kept"]
            return
        self._grams = {(i, j): state[f"gram/{i}/{j}"] for i, j in self._grams}
        self._linear, self._counts = state["linear"], state["counts"]

    def encoded(self, dtype: str) -> Values:
        """The sums as tensors to travel, by flat name; in ``float16`` or ``float32``.

        Classes of which no row was added are left out.
        """
        counts = self._kept[:, self._width :].sum(axis=0) if self._few else self._counts
        there = np.flatnonzero(counts > 0)
        classes = {CLASSES: self._classes[there[1:] - 1].astype(np.float32)}
        if self._few:
            return classes | {ROWS: self._rotated(there, dtype)}
        # Means instead of sums: those of half precision end at 65,504.
        share = np.float32(1 / self.rows)
        grams = {
            _gram(i // self._size, j // self._size): (gram * share).astype(dtype)
            for (i, j), gram in self._grams.items()
        }
        linear = (self._linear[:, there] * share).astype(dtype)
        return classes | grams | {LINEAR: linear, COUNTS: counts[there].astype(np.float32)}

    def _rotated(self, there: NDArray[np.int64], dtype: str) -> FloatArray:
        """Upper trapezoid of Qᵀ[F 1 Y], row by row in one vector, with the columns of the classes that are there."""
        kept = self._kept[: self.rows]
        orthogonal = np.linalg.qr(kept[:, : self.rows].astype(np.float64))[0].T.astype(np.float32)
        for start in range(0, kept.shape[1], self._size):
            part = slice(start, start + self._size)
            kept[:, part] = orthogonal @ kept[:, part]
        columns = np.concatenate([np.arange(self._width), self._width + there])
        flat = np.empty(self.rows * len(columns) - self.rows * (self.rows - 1) // 2, dtype)
        start = 0
        for number, row in enumerate(kept):
            end = start + len(columns) - number
            flat[start:end] = row[columns[number:]]
            start = end
        return flat


def sums_bytes(rows: int, width: int, size: int, classes: int, *, as_vector: bool = False) -> int:
    """Memory that a device needs to make and encode its sums, in bytes.

    Args:
        rows: number of its rows.
        width: number D of a row's features.
        size: number of features of one block.
        classes: number of classes, of which it may have all.
        as_vector: whether they travel as one vector, with noise or masked: the whole Gram matrix and three copies of
            its half, in double precision.
    """
    if as_vector:
        vector = width * (width + 1) // 2 + width * (1 + classes) + classes
        return sums_bytes(rows, width, size, classes) + 8 * (width * width + 3 * vector)
    wide = 1 + min(classes, rows)
    if rows < width * FEW_ROWS:
        # Kept rows, their trapezoid and its encoding; Q and what LAPACK works on, in double precision.
        return 3 * 4 * rows * (width + wide) + 4 * 8 * rows * rows
    blocks = width // size
    return 3 * 4 * (blocks * (blocks + 1) // 2 * size * size + width * wide)


def encode_sums(sums: Values) -> bytes:
    """Safetensors bytes of :meth:`SumsBuilder.encoded`, each tensor in its own precision."""
    return bytes(save({name: np.ascontiguousarray(sums[name]) for name in sorted(sums)}))


def decode_sums(data: bytes, form: SumsForm) -> FeatureSums:
    """Parse and check sums.

    Args:
        data: safetensors bytes from outside.
        form: what they were asked for to be.

    Raises:
        SliceError: the bytes are not such sums: a tensor is missing, unknown, of another shape or type, or not finite;
            classes or counts contradict each other; or the sums are larger than their rows allow. Says which.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SliceError(f"sums are not a safetensors file: {error}") from error
    classes = _classes(tensors, form.labels)
    if ROWS in tensors:
        rows, gram, beside, counts = _from_rows(tensors, form, len(classes))
    else:
        rows, gram, beside, counts = _from_grams(tensors, form, len(classes))
    _check_sizes(rows, gram, beside, counts, form)
    linear = np.zeros((form.width, 1 + form.labels))
    linear[:, 0] = beside[:, 0]
    linear[:, 1 + classes] = beside[:, 1:]
    all_counts = np.zeros(form.labels)
    all_counts[classes] = counts[1:]
    return FeatureSums(rows, gram, linear, all_counts)


def check_sums(sums: FeatureSums, form: SumsForm) -> None:
    """Check sums of several devices of which nobody saw the parts.

    Raises:
        SliceError: they are larger than their rows allow, or counts are not of rows.
    """
    counts = np.concatenate([[sums.rows], sums.counts])
    if (np.abs(counts - np.rint(counts)) > MASKED_ROUNDING).any() or (counts < -MASKED_ROUNDING).any():
        raise SliceError("the counts of the classes are no whole numbers of rows")
    there = np.flatnonzero(np.rint(sums.counts) > 0)
    beside = sums.linear[:, [0, *(1 + there)]]
    _check_sizes(sums.rows, sums.gram, beside, np.rint(counts[[0, *(1 + there)]]), form)


def _gram(i: int, j: int) -> str:
    return f"{PREFIX}gram_{i}_{j}"


def _pairs(blocks: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(blocks) for j in range(i, blocks))


def _classes(tensors: Mapping[str, NDArray[np.generic]], labels: int) -> NDArray[np.int64]:
    found = _checked(tensors, CLASSES, None, "float32").ravel()
    classes = found.astype(np.int64)
    ascending = len(found) > 0 and bool((classes == found).all()) and bool((np.diff(classes) > 0).all())
    if not ascending or classes[0] < 0 or classes[-1] >= labels:
        raise SliceError(f"{CLASSES} must hold indices of the package's {labels} labels once and in order")
    return classes


def _from_rows(
    tensors: Mapping[str, NDArray[np.generic]], form: SumsForm, classes: int
) -> tuple[int, DoubleArray, DoubleArray, DoubleArray]:
    _only(tensors, {CLASSES, ROWS})
    width, columns = form.width, form.width + 1 + classes
    flat = _checked(tensors, ROWS, None, form.dtype).ravel()
    # A trapezoid of n rows has n·columns - n(n-1)/2 numbers.
    rows = next((n for n in range(1, columns) if n * columns - n * (n - 1) // 2 >= len(flat)), columns)
    if rows * columns - rows * (rows - 1) // 2 != len(flat) or rows >= width * FEW_ROWS:
        raise SliceError(f"{ROWS} has {len(flat)} numbers, which make no rows of {columns} columns")
    rotated = np.zeros((rows, columns))
    start = 0
    for row in range(rows):
        rotated[row, row:] = flat[start : start + columns - row]
        start += columns - row
    features, beside = rotated[:, :width], rotated[:, width:]
    counts = np.rint(beside.T @ beside[:, 0])
    if counts[0] != rows:
        raise SliceError(f"{ROWS} has {rows} rows, and its own count of them is {counts[0]:g}")
    return rows, features.T @ features, features.T @ beside, counts


def _from_grams(
    tensors: Mapping[str, NDArray[np.generic]], form: SumsForm, classes: int
) -> tuple[int, DoubleArray, DoubleArray, DoubleArray]:
    width, size, dtype = form.width, form.size, form.dtype
    pairs = list(_pairs(width // size))
    _only(tensors, {CLASSES, COUNTS, LINEAR, *(_gram(i, j) for i, j in pairs)})
    counts = _checked(tensors, COUNTS, (1 + classes,), "float32").astype(np.float64)
    rows = int(counts[0]) if counts[0] == np.rint(counts[0]) else 0
    if rows < 1 or rows > 1 << 24 or not (counts == np.rint(counts)).all():
        raise SliceError(f"{COUNTS} must hold whole numbers of rows")
    gram = np.zeros((width, width))
    for i, j in pairs:
        block = _checked(tensors, _gram(i, j), (size, size), dtype).astype(np.float64) * rows
        if i == j:
            if not np.allclose(block, block.T, rtol=0, atol=ROUNDING[dtype] * np.abs(block).max()):
                raise SliceError(f"{_gram(i, j)} is not symmetric")
            block = (block + block.T) / 2
        gram[i * size : (i + 1) * size, j * size : (j + 1) * size] = block
        gram[j * size : (j + 1) * size, i * size : (i + 1) * size] = block.T
    linear = _checked(tensors, LINEAR, (width, 1 + classes), dtype).astype(np.float64) * rows
    return rows, gram, linear, counts


def _check_sizes(
    rows: int, gram: DoubleArray, beside: DoubleArray, counts: DoubleArray, form: SumsForm
) -> None:
    """Check sums against the number of rows that they are of."""
    rounding = ROUNDING[form.dtype]
    if not (counts[1:] > 0).all() or counts[1:].sum() != rows or counts[0] != rows:
        raise SliceError(f"the counts of the classes make {counts[1:].sum():g} rows of {rows}")
    squares = np.diagonal(gram)
    if (squares < 0).any() or squares.sum() > rows * form.square * (1 + rounding):
        raise SliceError(
            f"the squares of the features sum to {squares.sum():.4g}, and {rows} rows of {form.square} allow "
            f"{rows * form.square}"
        )
    # Cauchy and Schwarz, with what rounding adds.
    roots = np.sqrt(squares) + np.sqrt(rounding * rows)
    if (np.abs(gram) > np.outer(roots, roots)).any():
        raise SliceError("a product of two features exceeds what their squares allow")
    if (np.abs(beside) > np.outer(roots, np.sqrt(counts) * (1 + rounding))).any():
        raise SliceError("a sum of features exceeds what their squares allow")


def _checked(
    tensors: Mapping[str, NDArray[np.generic]], name: str, shape: tuple[int, ...] | None, dtype: str
) -> NDArray[np.generic]:
    """A tensor with its type, shape and numbers checked; ``shape`` None takes any vector."""
    if name not in tensors:
        raise SliceError(f"tensor {name} is missing")
    array = tensors[name]
    if array.dtype != np.dtype(dtype) or (array.ndim != 1 if shape is None else array.shape != shape):
        raise SliceError(f"tensor {name} is {array.dtype}{array.shape}, expected {dtype}{shape or '(n,)'}")
    if not np.isfinite(array.astype(np.float64)).all():
        raise SliceError(f"tensor {name} holds a number that is not finite")
    return array


def _only(tensors: Mapping[str, object], expected: set[str]) -> None:
    if unknown := sorted(set(tensors) - expected):
        raise SliceError(f"unknown tensor {unknown[0]} among the sums")
