"""What plan and profile say of a package that keeps the largest activations alone."""

from __future__ import annotations

from msgspec.structs import replace

from edge_runtime.memory.plan import Plan, Planner, Work, choices
from edge_runtime.package.manifest import SizeTerm, TopActivations
from edge_runtime.profile.top_activations import top_activations_line
from tests.edge_runtime.memory.test_plan import ALL, MODEL


def planned() -> tuple[Planner, Plan]:
    """A plan of the package with a dense live set of 8 MiB for each draw."""
    arithmetic = Planner(MODEL).arithmetic
    dense = {arithmetic: ((SizeTerm(float(8 << 20), 0, 0, 1),),)}
    planner = Planner(replace(MODEL, mlp_topk=TopActivations(96, 1536, 0.0625, 0.2, dense)))
    asked = Work(4, 32, 1, ALL)
    return planner, planner.plan(asked, next(choices(asked)))


def test_density_and_live_sets_are_told() -> None:
    """What was kept and measured, and what a block with tangents holds with and without the choice."""
    line = top_activations_line(*planned())
    assert line is not None
    assert line.startswith(
        "Feed-forward parts keep 96 of 1536 activations of each token: at export 6.2 % were not"
    )
    assert "20 % had been above zero" in line
    assert line.endswith("8.00 MiB with all.")


def test_backpropagation_carries_no_tangents() -> None:
    """For backpropagation the sentence ends with what was measured."""
    planner, plan = planned()
    line = top_activations_line(planner, replace(plan, work=replace(plan.work, update="backprop")))
    assert line is not None
    assert "live set" not in line


def test_a_dense_package_has_no_such_sentence() -> None:
    """A package that keeps all activations says nothing about them."""
    planner, work = Planner(MODEL), Work(4, 32, 1, ALL)
    assert top_activations_line(planner, planner.plan(work, next(choices(work)))) is None
