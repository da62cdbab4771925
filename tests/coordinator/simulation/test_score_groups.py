from __future__ import annotations

import json

from coordinator.simulation.config import read_simulation_config
from coordinator.simulation.report.comparison import compare
from coordinator.simulation.report.page import comparison_page
from coordinator.simulation.report.table import text_table
from tests.coordinator.simulation.conftest import Workshop

OWNERS = ("swahili", "hausa", "yoruba")


def test_owners_that_took_part_are_told_from_those_that_did_not(workshop: Workshop) -> None:
    """With two devices for three owners, the owner with fewest rows is unseen; table and page say what came of it."""
    for name in ("train", "dev"):
        path = workshop.folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # Two rows in four are the first owner's, one each the others'; the last gives one up.
        owned = [{**row, "owner": OWNERS[max(0, number % 4 - 1)]} for number, row in enumerate(rows)]
        owned[3]["owner"] = OWNERS[0]
        path.write_text("".join(json.dumps(row) + "\n" for row in owned))
    data = {"partition": "natural", "rows_per_device": None}
    run = {"rounds": 2, "devices_per_round": 2, "min_results": 1}
    (record,) = workshop.simulate(data=data, run=run, fleet={"devices": 2})
    found = record.robustness
    assert found is not None
    assert {group.group: group.took_part for group in found.groups} == {
        "hausa": True,
        "swahili": True,
        "yoruba": False,
    }
    assert sum(group.rows for group in found.groups) == 12
    assert found.crrm_standin == (found.seen + found.unseen) / 2
    made = compare(read_simulation_config(workshop.folder / "sim.toml"), [record])
    assert "crrm stand-in" in text_table(made).splitlines()[0]
    assert "stands in for a published metric" in comparison_page(made)


def test_rows_of_nobody_have_no_groups(workshop: Workshop) -> None:
    """Without owners there is no robustness, and the table has no columns of it."""
    (record,) = workshop.simulate(run={"rounds": 1})
    assert record.robustness is None
    made = compare(read_simulation_config(workshop.folder / "sim.toml"), [record])
    assert "unseen" not in text_table(made)
