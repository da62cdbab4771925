"""Runs that go on from the sums of an earlier one: with rows added or taken away, and new labels.

Sums are of features, so nothing may differ on which features depend: the model and its trained slices, the blocks and
their pooling, the lengths of texts, and how sums travel. Labels may be added behind those there were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from coordinator.aggregation.server_state import ServerState
from coordinator.storage.stores import Stores
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.slices import decode_values, encode_values, key, shapes
from edge_runtime.training.feature_sums import form_of
from edge_runtime.training.handed_in import MOST_SUMS_BYTES

if TYPE_CHECKING:
    from coordinator.config import RunConfig
    from coordinator.rounds.runs import Run

ENDED = ("finished", "stopped", "failed")


def check_continues(earlier: Run, config: RunConfig, seen: Manifest) -> None:
    """Check that a run can go on from another's sums.

    Args:
        earlier: the earlier run.
        config: configuration of the new run, its features chosen.
        seen: manifest of the new run's package, as that run sees it.

    Raises:
        ConfigError: it cannot; says for what, and what to do.
    """
    if earlier.state not in ENDED:
        raise ConfigError(
            f"run {earlier.run_id} has not ended ({earlier.state}), and its sums may still change: wait for its end, "
            f"or stop it with: edge-coordinator run stop {earlier.run_id}"
        )
    if earlier.config.secure_aggregation or earlier.config.privacy is not None:
        raise ConfigError(
            f"run {earlier.run_id} had the sums of devices masked or noised, so none of them can be taken off again: "
            "leave out continue_from, and ask all devices anew"
        )
    way_out = f'make it so, or leave out continue_from = "{earlier.run_id}" and ask all devices anew'
    if difference := _other_settings(earlier, config, seen) or _other_package(earlier, seen):
        raise ConfigError(f"{difference}: {way_out}")
    whole_bytes = form_of(config, seen).whole_bytes
    if 2 * whole_bytes > MOST_SUMS_BYTES:
        raise ConfigError(
            f"sums of {whole_bytes} bytes cannot be taken off and replaced in one result of {MOST_SUMS_BYTES} bytes: "
            'create a run without continue_from, with sums_dtype = "float16", a sums_projection or fewer features'
        )


def go_on(stores: Stores, earlier: Run, seen: Manifest) -> tuple[str, str]:
    """Store what a run begins with: the earlier one's values and sums, with room for new labels.

    Returns:
        Digests of the slice values and of the server's state.

    Raises:
        ConfigError: the earlier run has no sums.
    """
    state = None
    if earlier.optimizer_sha256 is not None:
        state = ServerState.decode(stores.private_blobs.get(earlier.optimizer_sha256))
    if state is None or state.sums is None or not earlier.in_last_visit:
        raise ConfigError(
            f"run {earlier.run_id} ended without sums of a last visit, so there is nothing to go on from; leave out "
            "continue_from and ask all devices anew"
        )
    values = dict(decode_values(stores.blobs.get(earlier.values_sha256), earlier.manifest.slices))
    head = earlier.head_name
    more = len(seen.labels) - len(earlier.manifest.labels)
    for name, pads in (("weight", ((0, more), (0, 0))), ("bias", ((0, more),))):
        values[key(head, name)] = np.pad(values[key(head, name)], pads)
    begun = ServerState(sums=state.sums.with_labels(len(seen.labels)), ridge=state.ridge)
    return (
        stores.blobs.put(encode_values({name: values[name] for name in shapes(seen.slices)}, seen)),
        stores.private_blobs.put(begun.encode()),
    )


def _other_settings(earlier: Run, config: RunConfig, seen: Manifest) -> str:
    """Which setting differs on which sums depend, in words; empty if none does."""
    before, manifest = earlier.config, earlier.manifest
    run = f"run {earlier.run_id}"
    if before.head != "closed_form":
        return f"{run} solved for no head in closed form, so it has no sums"
    for name in ("features", "pooling", "sums_dtype", "sums_projection"):
        was, now = getattr(before, name), getattr(config, name)
        if was != now:
            return f"{name} = {_shown(now)}, and the sums of {run} are of {name} = {_shown(was)}"
    if config.sums_projection and before.seed != config.seed:
        return f"seed = {config.seed}, and the projections of {run} were drawn from seed = {before.seed}"
    lengths = [
        min(each.sequence_limit, other.sequence_limit) for each, other in ((before, manifest), (config, seen))
    ]
    if lengths[0] != lengths[1]:
        return f"texts are cut at {lengths[1]} tokens, and those of {run} were at {lengths[0]}"
    return ""


def _other_package(earlier: Run, seen: Manifest) -> str:
    """What of the package differs on which sums depend, in words; empty if nothing does."""
    manifest, run = earlier.manifest, f"run {earlier.run_id}"
    if seen.labels[: len(manifest.labels)] != manifest.labels:
        return (
            f"package {seen.name} must have the {len(manifest.labels)} labels of {run} first, in their order, and new "
            "ones behind them"
        )
    if _model(manifest) != _model(seen):
        return f"package {seen.name} has another model, other slices or another tokenizer than that of {run}"
    return ""


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value}"


def _model(manifest: Manifest) -> tuple[object, ...]:
    """All of a package that features depend on: the programs and weights that run, and the files of the tokenizer."""
    segments = manifest.segments_run
    weights = [
        {
            name: (manifest.files[ref.file].sha256, replace(ref, file=""))
            for name, ref in segment.weights.items()
        }
        for segment in segments
    ]
    programs = [
        {
            arithmetic: manifest.files[variant.file].sha256
            for arithmetic, variant in manifest.programs[segment.primal].variants.items()
        }
        for segment in segments
    ]
    slices = [spec for spec in manifest.slices if spec.kind != "head"]
    tokenizer = manifest.files[manifest.tokenizer].sha256
    return (
        weights,
        programs,
        slices,
        tokenizer,
        manifest.pad_token_id,
        manifest.base.hidden_size,
        manifest.features,
    )
