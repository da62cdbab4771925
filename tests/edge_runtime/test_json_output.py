"""``--json``: each command prints one document that its schema on docs/json.md admits, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from docs.generate.outputs import OUTPUTS, schema_of
from edge_runtime import cli
from tests.edge_runtime.profile.test_plan_command import package
from tests.edge_runtime.test_cli import url, write_config

__all__ = ["package", "url"]  # fixtures


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """Exit code of a command, and its document, which fits its schema."""
    capsys.readouterr()
    code = cli.main([*words, "--json"])
    document = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema_of(words[0])).validate(document)
    return code, document


def test_commands_of_a_device(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Enrolment, status, check, doctor and the bundle: what each prints is admitted by its schema."""
    config = write_config(tmp_path, url, "[eligibility]\nleast_rows = 2\n")
    assert printed(capsys, "enrol", "--config", config)[1]["device_id"] == "d-7"
    status = printed(capsys, "status", "--config", config)[1]
    assert (status["device_id"], status["not_eligible"]) == ("d-7", "few_rows")
    code, lines = printed(capsys, "check", "--config", config)
    assert (code, {line["error"] for line in lines}) == (0, {""})
    assert {line["level"] for line in printed(capsys, "doctor", "--config", config)[1]} <= {
        "OK",
        "WARN",
        "FAIL",
    }
    output = tmp_path / "bundle.tar.gz"
    bundle = printed(capsys, "support-bundle", "--config", config, "--output", str(output))[1]
    assert bundle == {"path": str(output), "bytes": output.stat().st_size}


def test_a_check_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first failure's code is the command's; each has the name of its class."""
    code, lines = printed(capsys, "check", "--config", write_config(tmp_path, "http://127.0.0.1:9"))
    failed = {line["name"]: (line["error"], line["exit_code"]) for line in lines if line["error"]}
    assert (code, failed["coordinator"]) == (21, ("UnreachableError", 21))


def test_a_plan(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan has its choice, its peak by part, and the smallest cap."""
    code, answer = printed(capsys, "plan", str(package), "--cap", "256M")
    assert code == 0
    assert answer["plan"]["choice"]["weights"] in ("resident", "streamed")
    assert 0 < answer["smallest_cap_bytes"] <= answer["cap_bytes"] == 256 << 20


def test_a_schema_refuses_what_does_not_fit() -> None:
    """Every command has a schema that an empty object or list does not simply pass for."""
    for command in OUTPUTS:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema_of(command)).validate(
                [{}] if command == "plan" else {"a": 1}
            )
