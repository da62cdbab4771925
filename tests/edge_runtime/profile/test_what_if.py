"""The grid of other sizes: bounded, around the work that was asked, with the chosen plan in it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_runtime.errors import CapExceededError
from edge_runtime.figures import MIB
from edge_runtime.memory.plan import USABLE_SHARE, ExecutionChoice, Planner, Work
from edge_runtime.package.manifest import SizeTerm
from edge_runtime.package.prepared import Calibration
from edge_runtime.profile.text import option_lines
from edge_runtime.profile.what_if import MAX_OPTIONS, edges, what_if, worst_case
from tests.edge_runtime.packages import make_manifest

CAP_BYTES = 76 << 20
ASKED = Work(8, 32, 2, ("block0.query",))


def planner(calibration: Calibration | None = None) -> Planner:
    """Of the little package, 2 MiB a token and example alive."""
    manifest = make_manifest()
    block = manifest.programs["block"]
    live = ((SizeTerm(16384.0, 1, 1, 1),),)
    variants = {name: replace(variant, live=live) for name, variant in block.variants.items()}
    return Planner(
        replace(manifest, programs={"block": replace(block, variants=variants)}), None, 0, calibration
    )


def test_one_row_is_the_chosen_plan() -> None:
    """The chosen plan is in the grid once, marked, with the peak the planner predicted for it."""
    plan = planner().choose(ASKED, CAP_BYTES)
    options = what_if(planner(), ASKED, plan, CAP_BYTES)
    (chosen,) = [option for option in options if option.chosen]
    assert chosen.predicted_peak_bytes == plan.peak.total_bytes
    assert chosen.fits
    assert (chosen.batch_size, chosen.micro_batch, chosen.draws) == (8, plan.choice.micro_batch, 2)
    assert len(options) <= MAX_OPTIONS


def test_a_way_that_nobody_would_list_is_listed_when_it_was_chosen() -> None:
    """A plan forced upon the runtime has a row of its own."""
    plan = planner().plan(ASKED, ExecutionChoice("resident", 3, 1))
    (chosen,) = [option for option in what_if(planner(), ASKED, plan, CAP_BYTES) if option.chosen]
    assert (chosen.micro_batch, chosen.draws_at_a_time) == (3, 1)
    assert any("2 by 1" in line for line in option_lines([chosen]))


def test_the_grid_goes_around_the_work() -> None:
    """Batch, sequence and draws are varied, within the package's limits, and no row stands twice."""
    plan = planner().choose(ASKED, CAP_BYTES)
    options = what_if(planner(), ASKED, plan, CAP_BYTES)
    assert {option.batch_size for option in options} == {4, 8, 16}
    assert {option.sequence for option in options} == {16, 32, 64}
    assert {option.draws for option in options} == {1, 2, 4}
    assert {option.weights for option in options} == {"resident", "streamed"}
    assert len(set(options)) == len(options)


def test_a_row_fits_by_the_rule_that_plans_are_chosen_by() -> None:
    """What fits is what is within the usable share of the cap, neither more nor less."""
    options = what_if(planner(), ASKED, planner().choose(ASKED, CAP_BYTES), CAP_BYTES)
    usable = int(CAP_BYTES * USABLE_SHARE)
    assert {option.fits for option in options} == {True, False}
    assert all(option.fits == (option.predicted_peak_bytes <= usable) for option in options)


def test_time_is_there_where_the_machine_was_measured() -> None:
    """Without a calibration no row has a time, with one every row has."""
    plan = planner().choose(ASKED, CAP_BYTES)
    assert {option.predicted_step_s for option in what_if(planner(), ASKED, plan, CAP_BYTES)} == {None}
    measured = planner(Calibration(1, 32, 0.001, 0.002, 0.005))
    assert all(option.predicted_step_s for option in what_if(measured, ASKED, plan, CAP_BYTES))


def test_work_with_less_than_was_asked_comes_first() -> None:
    """After the ladder, the work that is done heads the grid and the work that was asked for follows."""
    done = replace(ASKED, sequence=16)
    options = what_if(planner(), ASKED, planner().choose(done, CAP_BYTES), CAP_BYTES)
    assert options[0].sequence == 16
    assert any(option.sequence == 32 and option.batch_size == 8 for option in options)
    assert sum(option.chosen for option in options) == 1


def test_training_the_head_alone_has_a_grid_too() -> None:
    """Without slices there is nothing to leave out, and the grid stands."""
    work = Work(8, 32, 1, ())
    options = what_if(planner(), work, planner().choose(work, CAP_BYTES), CAP_BYTES)
    assert {option.slices for option in options} == {0}
    assert sum(option.chosen for option in options) == 1


def test_the_edge_is_where_the_planner_refuses() -> None:
    """The largest size of each kind has a plan under the cap, and the first that is over has none."""
    plan = planner().choose(ASKED, CAP_BYTES)
    found = {edge.size: edge for edge in edges(planner(), plan, CAP_BYTES)}
    assert set(found) == {"batch_size", "sequence", "draws"}
    for size, edge in found.items():
        assert edge.largest is not None
        planner().choose(replace(plan.work, **{size: getattr(edge.largest, size)}), CAP_BYTES)
        if edge.first_over is None:
            assert getattr(edge.largest, size) == edge.bound
        else:
            with pytest.raises(CapExceededError):
                planner().choose(replace(plan.work, **{size: getattr(edge.first_over, size)}), CAP_BYTES)
            assert getattr(edge.first_over, size) <= 2 * getattr(edge.largest, size)
    assert found["sequence"].bound == 64
    assert any(edge.first_over is not None for edge in found.values())


def test_the_edge_is_found_from_above_too() -> None:
    """Where the work itself does not fit, sizes are halved until one does; some sizes have none that does."""
    large = planner().plan(replace(ASKED, batch_size=4096, sequence=64), ExecutionChoice("streamed", 1, 1))
    found = {edge.size: edge for edge in edges(planner(), large, CAP_BYTES)}
    batch, draws = found["batch_size"], found["draws"]
    assert batch.largest is not None
    assert batch.first_over is not None
    assert batch.first_over.batch_size == 2 * batch.largest.batch_size
    assert draws.largest is None
    assert draws.first_over is not None
    assert draws.first_over.draws == 1


def test_backpropagation_has_no_draws_to_vary() -> None:
    """Only forward mode has an edge of draws."""
    plan = planner().plan(Work(8, 32, 1, ()), ExecutionChoice("resident", 1, 1))
    assert [edge.size for edge in edges(planner(), plan, CAP_BYTES)] == ["batch_size", "sequence"]


def test_the_worst_case_tells_caps_that_work() -> None:
    """Both caps have a plan; one MiB below the smaller there is none, and under the advised one nothing is slower."""
    asked = replace(ASKED, sequence=64)
    worst = worst_case(planner(), asked, 128 << 20)
    assert worst.fits
    assert planner().choose(asked, worst.smallest_cap_bytes)
    with pytest.raises(CapExceededError):
        planner().choose(asked, worst.smallest_cap_bytes - MIB)
    assert worst.smallest_cap_bytes <= worst.advised_cap_bytes <= 128 << 20
    assert planner().choose(asked, worst.advised_cap_bytes).gave_up == worst.gave_up


def test_the_worst_case_may_not_fit() -> None:
    """Where no plan fits, the smallest is told, and both caps are above the one that was tried."""
    asked = replace(ASKED, batch_size=4096, sequence=64)
    worst = worst_case(planner(), asked, CAP_BYTES)
    assert not worst.fits
    assert worst.predicted_peak_bytes == planner().smallest(asked).peak.total_bytes
    assert CAP_BYTES < worst.smallest_cap_bytes <= worst.advised_cap_bytes


def test_what_was_measured_beyond_the_prediction_is_added() -> None:
    """A peak that was predicted too low raises every figure that is predicted from it."""
    plain, raised = (worst_case(planner(), ASKED, 128 << 20, excess) for excess in (0, 3 * MIB))
    assert raised.predicted_peak_bytes == plain.predicted_peak_bytes + 3 * MIB
    assert raised.smallest_cap_bytes == plain.smallest_cap_bytes + 3 * MIB
    assert raised.advised_cap_bytes >= plain.advised_cap_bytes
