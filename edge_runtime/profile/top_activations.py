"""What a package that keeps the largest activations alone saves: measured density, and live sets with and without."""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from edge_runtime.figures import share, size
from edge_runtime.memory.plan import Plan, Planner, live_bytes


def top_activations_line(planner: Planner, plan: Plan) -> str | None:
    """A sentence with both; None for a package that keeps all."""
    manifest = planner.manifest
    top = manifest.mlp_topk
    if top is UNSET:
        return None
    line = (
        f"Feed-forward parts keep {top.kept} of {top.width} activations of each token: at export "
        f"{share(top.density)} were not zero, and {share(top.positive)} had been above zero."
    )
    dual, dense = manifest.segments[-2].dual, top.dense_live.get(planner.arithmetic)
    if dual is None or dense is None or plan.work.update == "backprop":
        return line
    variant = manifest.programs[dual].variants[planner.arithmetic]
    sizes = plan.choice.micro_batch, plan.work.sequence, max(1, plan.choice.draws_at_a_time)
    kept, whole = live_bytes(variant, *sizes), live_bytes(replace(variant, live=dense), *sizes)
    saved = f"{size(kept)} with them, {size(whole)} with all"
    return f"{line} Predicted live set of a block with tangents: {saved}."
