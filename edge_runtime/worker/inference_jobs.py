"""What a worker that uses a model is asked, and what it answers.

Unlike a worker that trains (:mod:`edge_runtime.worker.jobs`), it stays: lines of JSON go in, an :class:`InferenceJob`
first and then one request after another, and lines of JSON come back. A request is answered before the next is read,
but for :class:`StopGenerating`, which ends the text that is being generated.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from edge_runtime.data.rows import MAX_ROW_BYTES
from edge_runtime.engines.names import EngineName
from edge_runtime.inference.requests import (
    Classified,
    ClassifyText,
    Finished,
    GenerateText,
    Piece,
    StopGenerating,
)
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.protocol.messages import Blocks, Bytes, Count, Pooling, PositiveCount, Sha256, Share
from edge_runtime.worker.jobs import Failure, PhaseEntered

#: Size of one request's line. JSON may write a character of a text as six.
MAX_REQUEST_BYTES = 6 * MAX_ROW_BYTES + (1 << 16)


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
        features: numbers of the blocks that the head reads; empty for the package's own features.
        pooling: way to make one vector of a text's hidden states, for ``features``.
        exits: blocks behind which texts may leave the model, by a head that reads one; those up to the deepest that
            fits are used; empty for none.
        confidence: least probability of a label at which a text leaves before the last of them.
    """

    package_folder: str
    package_sha256: Sha256
    prepared_folder: str
    state_path: str
    cap_bytes: Bytes
    threads: PositiveCount = 1
    engine: EngineName = "onnxruntime"
    sequence_limit: Count = 0
    features: Blocks = ()
    pooling: Pooling = "package"
    exits: Blocks = ()
    confidence: Share = 1.0


class Ready(Struct, frozen=True, tag="ready"):
    """Package and values are loaded, and requests can come.

    Attributes:
        arithmetic: arithmetic that the package is prepared in.
        weights: whether weights stay in memory or pass through it.
        predicted_peak_bytes: predicted peak memory.
        sequence_limit: largest number of tokens of a text.
        load_peak_bytes: largest resident size until then.
    """

    arithmetic: Arithmetic
    weights: Literal["packed", "resident", "streamed"]
    predicted_peak_bytes: Bytes
    sequence_limit: PositiveCount
    load_peak_bytes: Bytes = 0


class RequestFailed(Struct, frozen=True, tag="failed"):
    """One request cannot be answered; the next can.

    Attributes:
        failure: the error.
    """

    failure: Failure


Request = ClassifyText | GenerateText | StopGenerating
Answer = Ready | Classified | Piece | Finished | RequestFailed | PhaseEntered
