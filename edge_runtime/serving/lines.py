"""Lines of JSON that ``edge-runtime predict`` writes. ``row`` is there where rows come from a file or a pipe."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from edge_runtime.inference.requests import StopReason


class LabelLine(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A row's label.

    Attributes:
        row: number of the row's line.
        label: the most probable label.
        probabilities: probability of every label, in the package's order.
        tokens: number of tokens of the text that were looked at.
        depth: number of the block behind which the text left the model, where it has exits.
    """

    row: int | UnsetType = UNSET
    label: str
    probabilities: dict[str, float]
    tokens: int
    depth: int = 0


class PieceLine(Struct, frozen=True, kw_only=True):
    """The next piece of a generated text.

    Attributes:
        row: number of the row's line.
        text: the piece.
        tokens: number of tokens generated so far.
    """

    row: int | UnsetType = UNSET
    text: str
    tokens: int


class FinishedLine(Struct, frozen=True, kw_only=True):
    """The end of a generated text.

    Attributes:
        row: number of the row's line.
        finished: why the text ended.
        prompt_tokens: number of tokens of the text that it went on from.
        tokens: number of tokens generated.
        seconds: time that they took.
    """

    row: int | UnsetType = UNSET
    finished: StopReason
    prompt_tokens: int
    tokens: int
    seconds: float


class ErrorLine(Struct, frozen=True, kw_only=True):
    """A row that cannot be used.

    Attributes:
        row: number of the row's line.
        error: why, and what to do; nothing of the row.
    """

    row: int
    error: str


PredictLine = LabelLine | PieceLine | FinishedLine | ErrorLine
