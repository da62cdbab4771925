"""Lines of ``predict``: as printed they fit the schema on docs/json.md."""

from __future__ import annotations

import json

import jsonschema
import msgspec
import pytest

from docs.generate.outputs import predict_line_schema
from edge_runtime.serving.lines import LabelLine, PredictLine


def printed(line: PredictLine) -> dict:
    """A line as it is printed, which its schema on docs/json.md admits."""
    fields = json.loads(msgspec.json.encode(line))
    jsonschema.Draft202012Validator(predict_line_schema()).validate(fields)
    return fields


def test_lines_of_labels_fit_their_schema() -> None:
    """A label is printed with its row and its depth where there are such, and a line of another form is refused."""
    line = LabelLine(label="yes", probabilities={"no": 0.25, "yes": 0.75}, tokens=3)
    assert list(printed(line)) == ["label", "probabilities", "tokens"]
    there = msgspec.structs.replace(line, row=7, depth=2)
    assert list(printed(there)) == ["row", "label", "probabilities", "tokens", "depth"]
    for wrong in ({}, {"error": "x"}, {"row": 1, "label": "yes"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(predict_line_schema()).validate(wrong)
