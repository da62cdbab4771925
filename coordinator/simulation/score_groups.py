"""An arm's robustness: its first and last values on each owner's dev rows."""

from __future__ import annotations

from coordinator.rounds.evaluation import INITIAL, evaluation_of
from coordinator.rounds.robustness import GroupScore, Robustness, robustness_of
from coordinator.rounds.runs import find_run, initial_values
from coordinator.simulation.arm import Arm
from coordinator.simulation.labelled_rows import LabelledRows
from coordinator.simulation.workbench import Workbench
from coordinator.storage import simulation_rows


def score_groups(arm: Arm, bench: Workbench, train: LabelledRows, dev: LabelledRows) -> Robustness | None:
    """Robustness of an arm that has ended; None where dev or training rows have no owners.

    Args:
        arm: the arm.
        bench: bench that makes the evaluations.
        train: rows that devices share.
        dev: rows of evaluations, whose owners are the groups.
    """
    if train.owners is None or dev.owners is None:
        return None
    with arm.stores.storage.reading() as connection:
        run = find_run(arm.stores, connection, arm.run_id)
        counted = simulation_rows.devices_with_results(connection)
    evaluation = evaluation_of(arm.stores, run, INITIAL, run.result_sha256)
    if evaluation is None:
        return None
    before = initial_values(arm.stores, arm.stores.manifest(run.package_sha256), run.manifest, run.config)
    after = arm.stores.blobs.get(run.result_sha256)
    took_part = {train.owners[row] for name in counted for row in arm.fleet.devices[name].rows}
    groups = []
    for owner in sorted(set(dev.owners)):
        rows = tuple(index for index, each in enumerate(dev.owners) if each == owner)
        first, last = (bench.evaluate(evaluation.job, state, rows).accuracy for state in (before, after))
        groups.append(GroupScore(owner, owner in took_part, len(rows), first, last))
    return robustness_of(groups)
