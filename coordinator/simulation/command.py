"""``edge-coordinator simulate``: from a configuration file to records, table and page."""

from __future__ import annotations

import sys
from pathlib import Path

from coordinator.simulation.config import read_simulation_config
from coordinator.simulation.record import Record, read_records
from coordinator.simulation.report.comparison import ArmComparison, compare
from coordinator.simulation.report.page import comparison_page
from coordinator.simulation.report.progress import progress_for
from coordinator.simulation.report.table import text_table
from coordinator.simulation.sweep import Options, make_plan, sweep
from edge_runtime.durable import write_durably
from edge_runtime.errors import EdgeError


def simulate(config_path: Path, options: Options, *, page_only: bool = False) -> int:
    """Simulate, then compare all arms that the output folder has, and return the exit code.

    Args:
        config_path: path of the simulation's configuration.
        options: options of the command line.
        page_only: whether to simulate nothing, and make table and page again.

    Raises:
        EdgeError: nothing could be simulated as asked; or an arm failed, which is said once the others are done.
    """
    config = read_simulation_config(config_path)
    records: list[Record] = []
    if not page_only:
        plan = make_plan(config, options)
        with progress_for(len(plan.arms) * len(plan.seeds), sys.stdout) as progress:
            records = sweep(plan, progress)
    write_comparison(compare(config, read_records(options.output)), options.output)
    if failures := [record for record in records if record.status == "failed"]:
        first = failures[0]
        raise EdgeError(
            f"{len(failures)} of {len(records)} arms failed; the first: {first.arm}, seed {first.seed}: {first.reason}"
        )
    return 0


def write_comparison(comparison: ArmComparison, folder: Path) -> None:
    """Write table and page into the output folder, and print the table."""
    table = text_table(comparison)
    write_durably(folder / "comparison.txt", table.encode())
    write_durably(folder / "comparison.html", comparison_page(comparison).encode())
    sys.stdout.write("\n" + table)
