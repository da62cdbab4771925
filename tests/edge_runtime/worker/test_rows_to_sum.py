"""A device's second visit, in real workers: it passes over what has changed, and says what becomes of the rest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from edge_runtime.package.slices import encode_values
from edge_runtime.training.feature_sums import FeatureSums, decode_sums, form_of
from edge_runtime.training.handed_in import DIGEST_BYTES, Record
from edge_runtime.worker.jobs import HandedIn, TrainOutcome
from edge_runtime.worker.process import run_worker
from tests.edge_runtime.training.test_gather_sums import ASKED, with_zero_head
from tests.edge_runtime.worker.test_main import data, train_job, values  # noqa: F401 - fixtures


def test_a_second_visit_adds_new_rows_and_replaces_what_has_changed(
    prepared_in,
    values,  # noqa: F811
    train_job,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """New rows alone are summed up; nothing new is nothing to pass over; a row less is all rows again, or none."""
    prepared = prepared_in["float"]
    seen, start = with_zero_head(prepared, values)
    (tmp_path / "state.safetensors").write_bytes(encode_values(start, seen))
    lines = data.read_text().splitlines(keepends=True)
    rows, record = tmp_path / "rows", tmp_path / "record"
    sent: list[bytes] = []

    def visit(kept: list[str], count: int) -> tuple[TrainOutcome, FeatureSums | None]:
        """One visit of the device with its first so many rows."""
        data.write_text("".join(lines[:count]))
        record.write_bytes(Record(tuple(kept), rows.read_bytes() if kept else b"").encode())
        handed_in = HandedIn(str(record), sum(map(len, sent))) if kept else None
        job = train_job(
            prepared,
            job={"rows_path": str(rows), "row_key": "ab" * 32, "handed_in": handed_in},
            **ASKED,
        )
        outcome = run_worker(job, TrainOutcome)
        change = Path(job.delta_path).read_bytes()
        sent.append(change)
        return outcome, decode_sums(change, form_of(job.task, seen)) if change else None

    outcome, first = visit([], 5)
    assert first is not None
    assert (outcome.examples, first.rows, rows.stat().st_size) == (5, 5, 5 * DIGEST_BYTES)
    kept = [hashlib.sha256(sent[0]).hexdigest()]

    outcome, added = visit(kept, 8)
    assert added is not None
    assert (outcome.stands, outcome.examples, rows.stat().st_size) == (True, 3, 8 * DIGEST_BYTES)
    kept.append(hashlib.sha256(sent[1]).hexdigest())

    outcome, nothing = visit(kept, 8)
    assert (outcome.stands, outcome.examples, nothing) == (True, 0, None)

    outcome, whole = visit(kept, 7)
    assert whole is not None
    assert (outcome.stands, whole.rows, rows.stat().st_size) == (False, 7, 7 * DIGEST_BYTES)
    data.write_text("".join(lines[:8]))
    # The two parts together are the sums of all eight rows, of which one visit knows nothing else.
    both = first.plus(added)
    np.testing.assert_allclose(np.diagonal(both.gram).sum(), 8 * seen.base.hidden_size * 3, rtol=1e-3)
    assert (both.minus(whole).rows, json.loads(lines[7])["label"] in seen.labels) == (1, True)

    outcome, none = visit([hashlib.sha256(sent[-1]).hexdigest()], 0)
    assert (outcome.stands, outcome.examples, none, rows.stat().st_size) == (False, 0, None, 0)
