"""Refusals and their HTTP status: every kind has one, and every code keeps the one it always had."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from coordinator.api.statuses import STATUS
from coordinator.refusals import RefusalError

ROOT = Path(__file__).parents[3]
KINDS = {kind.__name__: kind for kind in RefusalError.__subclasses__()}
#: Codes by the status they are answered with. Devices and scripts rely on both.
ANSWERS = {
    400: {"malformed", "protocol_unknown", "query_refused"},
    401: {
        "bad_signature",
        "clock_off",
        "not_admin",
        "not_monitor",
        "replayed",
        "signed_out",
        "token_expired",
        "token_used",
        "unknown_device",
        "unknown_token",
        "unsigned",
        "wrong_secret",
    },
    403: {"csrf", "no_right", "revoked"},
    404: {
        "unknown_blob",
        "unknown_device",
        "unknown_path",
        "unknown_round",
        "unknown_run",
        "unknown_task",
        "unknown_user",
    },
    408: {"too_slow"},
    409: {
        "conflict",
        "name_taken",
        "not_set_aside",
        "not_your_task",
        "nothing_to_release",
        "run_ended",
        "stale",
        "wrong_offset",
    },
    413: {"too_large"},
    422: {
        "bad_difference",
        "bad_keys",
        "bad_shares",
        "bad_slices",
        "bad_sums",
        "bad_vector",
        "digest_mismatch",
        "estimator_missing",
        "estimator_not_asked",
        "estimator_unavailable",
        "masking_not_asked",
        "not_finite",
        "not_masked",
        "too_many_draws",
        "too_many_examples",
        "too_many_steps",
    },
    429: {"too_often"},
    503: {"trouble"},
}
#: Where the code is the class of another error: a run that cannot be created.
COMPUTED = {422: {"type(error).__name__"}}


def refusals_made() -> list[tuple[str, str]]:
    """Kind and code of every refusal that the coordinator's modules make; a code that is computed as its expression."""
    made = []
    for path in sorted((ROOT / "coordinator").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                name = node.func.id
                if name in KINDS or name == RefusalError.__name__:
                    code = node.args[0]
                    made.append((name, code.value if isinstance(code, ast.Constant) else ast.unparse(code)))
    return made


def test_every_kind_of_refusal_has_a_status() -> None:
    """The table has each kind of refusal, nothing else, and no status twice."""
    assert set(STATUS) == set(KINDS.values())
    assert len(set(STATUS.values())) == len(STATUS)


def test_every_code_keeps_its_status() -> None:
    """Every refusal that is made anywhere is of a kind in the table, and its code has the status it always had."""
    found: dict[int, set[str]] = {}
    for kind, code in refusals_made():
        found.setdefault(STATUS[KINDS[kind]], set()).add(code)
    assert found == {status: codes | COMPUTED.get(status, set()) for status, codes in ANSWERS.items()}


def test_the_protocol_page_names_the_same_statuses() -> None:
    """Status and code of every refusal in the tables of docs/protocol.md are those that are answered."""
    text = (ROOT / "docs/protocol.md").read_text()
    rows = re.findall(r"^\| ([45]\d\d) \| `(\w+)` \|", text, re.MULTILINE)
    bounds = re.findall(r"\| ([45]\d\d) `(\w+)` \|", text)
    assert len(rows) > 15
    assert [row for row in (*rows, *bounds) if row[1] not in ANSWERS[int(row[0])]] == []
