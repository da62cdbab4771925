"""What ``edge-runtime serve`` says of itself: its messages, and the OpenAPI document made of them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from edge_runtime import __version__
from edge_runtime.inference.requests import Classified, Finished, InputText, Piece, Sampling
from edge_runtime.package.manifest import Arithmetic, TaskKind
from edge_runtime.protocol.messages import Bytes, PositiveCount, Sha256

PREDICT, HEALTH, DOCUMENT, PAGE = "/v1/predict", "/health", "/openapi.json", "/"
JSON, JSON_LINES = "application/json", "application/x-ndjson"


class PredictRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A text to predict.

    Attributes:
        text: the text; for a language model the text to go on from.
        sampling: how each next token is drawn; of no use to a classifier.
    """

    text: InputText
    sampling: Sampling = Sampling()


class Health(Struct, frozen=True):
    """State of the server.

    Attributes:
        status: ``ready`` where the worker runs, ``stopped`` where it ended and starts again with the next request.
        package: name of the package.
        package_sha256: digest that names the package.
        release: id of the release whose values are used; empty where they come from a file.
        task: the package's task.
        arithmetic: arithmetic that it runs in.
        sequence_limit: largest number of tokens of a text.
        cap_bytes: memory that the worker may take.
        predicted_peak_bytes: predicted peak memory.
        peak_bytes: the kernel's largest charge to the worker; None without a control group.
        enforced_by: means that holds the worker to its cap.
    """

    status: Literal["ready", "stopped"]
    package: str
    package_sha256: Sha256
    release: str
    task: TaskKind
    arithmetic: Arithmetic
    sequence_limit: PositiveCount
    cap_bytes: Bytes
    predicted_peak_bytes: Bytes
    peak_bytes: int | None
    enforced_by: str


class Problem(Struct, frozen=True):
    """Why a request was not answered.

    Attributes:
        code: class of the error, as docs/errors.md explains it; or what was wrong with the request.
        message: what happened and what to do; never the text.
    """

    code: str
    message: str


def openapi_document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of the server."""
    kinds = (PredictRequest, Classified, Piece, Finished, Health, Problem)
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    request, classified, piece, finished, health, problem = schemas

    def content(media: str, schema: Any) -> dict[str, Any]:
        return {"content": {media: {"schema": schema}}}

    refused = {"description": "not answered", **content(JSON, problem)}
    predict = {
        "summary": "Predict a text: a label with probabilities, or a text as lines of JSON, piece by piece",
        "requestBody": {"required": True, **content(JSON, request)},
        "responses": {
            "200": {
                "description": "the prediction",
                "content": {
                    JSON: {"schema": classified},
                    JSON_LINES: {"schema": {"anyOf": [piece, finished, problem]}},
                },
            },
            **dict.fromkeys(("400", "413", "415", "422", "503"), refused),
        },
    }
    state = {
        "summary": "What is served, and whether its worker runs",
        "responses": {"200": {"description": "the state", **content(JSON, health)}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "edge-runtime serve", "version": __version__},
        "paths": {PREDICT: {"post": predict}, HEALTH: {"get": state}},
        "components": {"schemas": components},
    }
