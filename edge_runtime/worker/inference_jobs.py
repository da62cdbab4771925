"""What a worker that uses a model is asked, and what it answers.

Unlike a worker that trains (:mod:`edge_runtime.worker.jobs`), it stays: lines of JSON go in, an :class:`InferenceJob`
first and then one request after another, and lines of JSON come back. A request is answered before the next is read,
but for :class:`StopGenerating`, which ends the text that is being generated.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_runtime.data.rows import MAX_ROW_BYTES
from edge_runtime.engines.names import EngineName
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.protocol.messages import Bytes, Count, PositiveCount, Seconds, Sha256
from edge_runtime.worker.jobs import Failure, PhaseEntered

#: Size of one request's line. JSON may write a character of a text as six.
MAX_REQUEST_BYTES = 6 * MAX_ROW_BYTES + (1 << 16)
MAX_STOP_STRINGS = 16

InputText = Annotated[str, Meta(min_length=1, max_length=MAX_ROW_BYTES)]
StopReason = Literal["stop_token", "stop_string", "length", "stopped"]
StopString = Annotated[str, Meta(min_length=1, max_length=200)]


class InferenceJob(Struct, frozen=True, tag="inference"):
    """Load a package and values, and answer requests until standard input ends.

    Attributes:
        package_folder: path of the package folder.
        package_sha256: digest that names the package.
        prepared_folder: path of the prepared folder.
        state_path: path of the file with the values of all slices.
        cap_bytes: memory that the kernel holds the worker to.
        threads: number of threads of the engine.
        engine: name of the engine.
        sequence_limit: largest number of tokens of a text, generated ones among them; 0 takes the package's.
    """

    package_folder: str
    package_sha256: Sha256
    prepared_folder: str
    state_path: str
    cap_bytes: Bytes
    threads: PositiveCount = 1
    engine: EngineName = "onnxruntime"
    sequence_limit: Count = 0


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


class Ready(Struct, frozen=True, tag="ready"):
    """Package and values are loaded, and requests can come.

    Attributes:
        arithmetic: arithmetic that the package is prepared in.
        weights: whether weights stay in memory or pass through it.
        predicted_peak_bytes: predicted peak memory.
        sequence_limit: largest number of tokens of a text.
    """

    arithmetic: Arithmetic
    weights: Literal["resident", "streamed"]
    predicted_peak_bytes: Bytes
    sequence_limit: PositiveCount


class Classified(Struct, frozen=True, tag="classified"):
    """The label of a text.

    Attributes:
        label: the most probable label.
        probabilities: probability of every label, in the package's order.
        tokens: number of tokens of the text that were looked at.
    """

    label: str
    probabilities: dict[str, float]
    tokens: PositiveCount


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


class RequestFailed(Struct, frozen=True, tag="failed"):
    """One request cannot be answered; the next can.

    Attributes:
        failure: the error.
    """

    failure: Failure


Request = ClassifyText | GenerateText | StopGenerating
Answer = Ready | Classified | Piece | Finished | RequestFailed | PhaseEntered
