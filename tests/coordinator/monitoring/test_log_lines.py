"""Log lines that programs read."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
from pathlib import Path

from coordinator.monitoring.log_lines import set_up

ROOT = Path(__file__).parents[3]


def logged(chosen: str, *arguments: object, **more: object) -> str:
    """What one call writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    set_up(handler, chosen)  # type: ignore[arg-type]
    logger = logging.Logger("coordinator")
    logger.addHandler(handler)
    logger.info(*arguments, **more)  # type: ignore[arg-type]
    return stream.getvalue()


def test_fields_keep_their_types_and_no_value_becomes_a_field() -> None:
    """A value that looks like a field stays a value, and a number a number."""
    line = json.loads(logged("json", "refused method=%s code=%s status=%d", "GET x=1", 'a" level=b', 401))
    assert line["event"] == "refused"
    assert (line["method"], line["code"], line["status"]) == ("GET x=1", 'a" level=b', 401)
    assert line["level"] == "info"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_a_traceback_is_one_line_of_json() -> None:
    """An error's traceback is a field."""
    try:
        int("of the test")
    except ValueError:
        text = logged("json", "crashed method=%s", "GET", exc_info=True)
    assert len(text.splitlines()) == 1
    assert "ValueError: invalid literal" in json.loads(text)["traceback"]


def test_text_stays_as_it_was() -> None:
    """Without the option a line is key=value."""
    assert re.fullmatch(
        r"time=\S+ \S+ level=INFO logger=coordinator refused code=x\n", logged("text", "refused code=%s", "x")
    )


def test_every_line_of_the_coordinator_has_an_event_and_fields() -> None:
    """No call in the coordinator logs a sentence: each template is a word and fields, so JSON has them all."""
    wrong = []
    for path in sorted((ROOT / "coordinator").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            if not (isinstance(owner, ast.Name) and owner.id == "log"):
                continue
            template = node.args[0]
            fields = r"\w+( \w+=(%[-+ #0-9.]*[a-z]|'[^']*'|[a-z_]+))*"
            if not (isinstance(template, ast.Constant) and re.fullmatch(fields, str(template.value))):
                wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong
