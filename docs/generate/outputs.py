"""Makes docs/json.md, the schemas of what ``edge-runtime … --json`` prints: ``python -m docs.generate.outputs``."""

from __future__ import annotations

from typing import Any

import msgspec

from docs.generate.configuration import ROOT
from edge_runtime.agent.check import CheckLine
from edge_runtime.agent.doctor import Diagnosis
from edge_runtime.agent.status import Status
from edge_runtime.agent.store import Identity
from edge_runtime.agent.support_bundle import Bundle
from edge_runtime.profile.document import Profile
from edge_runtime.profile.plan_text import PlanAnswer
from edge_runtime.serving.lines import ErrorLine, FinishedLine, LabelLine, PieceLine

PAGE = ROOT / "docs/json.md"
#: What each command prints with --json.
OUTPUTS: dict[str, Any] = {
    "check": list[CheckLine],
    "doctor": list[Diagnosis],
    "enrol": Identity,
    "plan": PlanAnswer,
    "profile": Profile,
    "status": Status,
    "support-bundle": Bundle,
}
#: What a line of ``predict`` may be.
PREDICT_LINES = (LabelLine, PieceLine, FinishedLine, ErrorLine)
OPENING = """<!-- Made by `make reference`. Change the structs, not this page. -->
# Output as JSON

With `--json` a command of `edge-runtime` prints one document on standard output, and nothing else there; errors stay
one line on standard error, with the exit codes of [errors.md](errors.md). New fields may come, so readers pass over
what they do not know. `predict` prints a JSON object a line in any case ([predict.md](predict.md)), whose schema
comes last. `serve` describes its answers at `/openapi.json`, and `run` writes its log as `key=value` lines.

The schemas are JSON Schema, draft 2020-12.
"""


def schema_of(command: str) -> dict[str, Any]:
    """The JSON Schema of what a command prints."""
    return msgspec.json.schema(OUTPUTS[command])


def predict_line_schema() -> dict[str, Any]:
    """The JSON Schema of a line that ``predict`` prints."""
    kinds, components = msgspec.json.schema_components(PREDICT_LINES, ref_template="#/$defs/{name}")
    return {"anyOf": list(kinds), "$defs": components}


def page() -> str:
    """The whole page."""
    parts = [OPENING]
    for command in sorted(OUTPUTS):
        parts += _section(f"{command} --json", schema_of(command))
    return "\n".join(parts + _section("predict, a line", predict_line_schema()))


def _section(title: str, schema: dict[str, Any]) -> list[str]:
    text = msgspec.json.format(msgspec.json.encode(schema), indent=2).decode()
    return [f"## edge-runtime {title}\n", f"```json\n{text}\n```\n"]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
