"""What is asked of a model, and what it answers; free of numpy, so that the process that asks stays small."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_runtime.data.rows import MAX_ROW_BYTES
from edge_runtime.protocol.messages import Count, PositiveCount, Seconds

MAX_STOP_STRINGS = 16

InputText = Annotated[str, Meta(min_length=1, max_length=MAX_ROW_BYTES)]
StopReason = Literal["stop_token", "stop_string", "length", "stopped"]
StopString = Annotated[str, Meta(min_length=1, max_length=200)]


class ClassifyText(Struct, frozen=True, tag="classify"):
    """Tell the label of a text.

    Attributes:
        text: the text.
    """

    text: InputText


class Sampling(Struct, frozen=True):
    """How the next token is drawn from its probabilities.

    Attributes:
        max_tokens: most tokens to generate; 0 as many as the package's limit leaves room for.
        temperature: what logits are divided by; 0 takes the most probable token, whatever the rest says.
        top_k: number of the most probable tokens to draw from; 0 draws from all.
        top_p: least sum of probabilities of the most probable tokens to draw from.
        seed: seed of the draws.
        stop: strings at which the text ends; it is given up to there.
    """

    max_tokens: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    stop: Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)] = ()


class GenerateText(Struct, frozen=True, tag="generate"):
    """Go on from a text.

    Attributes:
        text: text to go on from.
        sampling: how each next token is drawn.
    """

    text: InputText
    sampling: Sampling = Sampling()


class StopGenerating(Struct, frozen=True, tag="stop"):
    """End the text that is being generated; nothing happens if none is."""


class Classified(Struct, frozen=True, tag="classified"):
    """The label of a text.

    Attributes:
        label: the most probable label.
        probabilities: probability of every label, in the package's order.
        tokens: number of tokens of the text that were looked at.
        depth: number of the block behind which the text left the model; 0 where it has no exits.
    """

    label: str
    probabilities: dict[str, float]
    tokens: PositiveCount
    depth: Count = 0


class Piece(Struct, frozen=True, tag="piece"):
    """The next piece of a generated text.

    Attributes:
        text: its characters, at least one.
        tokens: number of tokens generated so far.
    """

    text: str
    tokens: PositiveCount


class Finished(Struct, frozen=True, tag="finished"):
    """The end of a generated text.

    Attributes:
        reason: ``stop_token`` or ``stop_string``, where the text ended by itself; ``length`` at the most tokens;
            ``stopped`` where it was told to.
        prompt_tokens: number of tokens of the text that it went on from.
        tokens: number of tokens generated.
        seconds: time that they took, the prompt's among it.
    """

    reason: StopReason
    prompt_tokens: PositiveCount
    tokens: Count
    seconds: Seconds
