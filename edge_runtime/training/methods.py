"""Which training settings go together: checked where a run is configured, and again where a task is done.

Nothing here needs numpy, so that the agent and the coordinator's configuration can call it.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.package.block_head import with_block_head
from edge_runtime.package.manifest import Manifest
from edge_runtime.protocol.messages import PER_EXAMPLE, LocalOptimizer, Task, TrainingSettings
from edge_runtime.slices.kinds import KINDS
from edge_runtime.training.trainable import trained_part

#: Number of projections in one block of their Gram matrix, of which all have a whole number.
PROJECTED_BLOCK = 128
#: Fewest numbers of a sketch for each number that it stands for (SGC, arXiv 2502.00311).
SKETCH_SHARE = 7


def check_method(settings: TrainingSettings) -> None:
    """Refuse settings that exclude each other.

    Raises:
        ConfigError: two of them do; names both and says what to do.
    """
    if settings.update == "backprop":
        if settings.draws != 1:
            raise ConfigError(f'update = "backprop" makes no draws, so draws = {settings.draws} must be 1')
        if settings.head == "perturbed":
            raise ConfigError('update = "backprop" perturbs nothing: head = "perturbed" must be "exact"')
        if settings.report == "scalars":
            raise ConfigError(
                'update = "backprop" has no directional derivatives to replay: report = "scalars" must be "weights"'
            )
        if settings.jvp_limit is not None:
            raise ConfigError(
                f'update = "backprop" has no directional derivatives: leave out jvp_limit = {settings.jvp_limit}'
            )
    if settings.update == "best":
        _check_best(settings)
    if settings.update == "zero_order" and settings.directions in PER_EXAMPLE:
        raise ConfigError(
            f'update = "zero_order" moves the values for a whole batch: directions = "{settings.directions}" would '
            'need batches of one; take "shared", "gaussian", "orthogonal" or "filtered"'
        )
    if settings.head == "closed_form" and not settings.train_head:
        raise ConfigError('head = "closed_form" solves for the head, and train_head = false leaves it alone')
    if settings.pooling != "package" and not settings.features and settings.head != "closed_form":
        raise ConfigError(
            f'pooling = "{settings.pooling}" belongs to features, and there are none: name the blocks that the head '
            "reads, or leave pooling out"
        )
    if settings.rank_mode != "fixed":
        _check_ranks(settings)
    _check_projection(settings)
    _check_sketch(settings)
    if settings.exits:
        _check_exits(settings)
    if settings.candidates > 1 and settings.directions != "filtered":
        raise ConfigError(
            f'candidates = {settings.candidates} belongs to directions = "filtered", not to "{settings.directions}"'
        )


def _check_ranks(settings: TrainingSettings) -> None:
    """A step of drawn ranks moves no others, and what is compared or weighed must not depend on the draw."""
    mode = settings.rank_mode
    if settings.directions == "filtered":
        raise ConfigError(
            f'rank_mode = "{mode}" draws directions of other ranks in each step, and "filtered" ones are compared with '
            'the last change of all; take other directions, such as "one_slice"'
        )
    if settings.update == "best":
        raise ConfigError(
            f'rank_mode = "{mode}" changes the variance of an estimate from step to step, by which update = "best" '
            'weighs devices; take update = "forward"'
        )


def _check_sketch(settings: TrainingSettings) -> None:
    """A sketch must be long enough that what it stands for is found in it, and of numbers that all devices have."""
    size, entries = settings.sketch_size, settings.sketch_entries
    if settings.report == "sketch" and not size:
        raise ConfigError('report = "sketch" needs sketch_size and sketch_entries: set both')
    if not size and entries:
        raise ConfigError(
            f"sketch_entries = {entries} needs a sketch_size of at least {SKETCH_SHARE * entries}"
        )
    if size and size < SKETCH_SHARE * max(1, entries):
        raise ConfigError(
            f"sketch_size = {size} must be at least {SKETCH_SHARE} times sketch_entries = {entries}, or matching "
            f"pursuit often fails; take sketch_size = {SKETCH_SHARE * max(1, entries)}"
            + (f" or sketch_entries = {size // SKETCH_SHARE}" if size >= SKETCH_SHARE else "")
        )
    if size and not entries:
        raise ConfigError(
            f"sketch_size = {size} needs sketch_entries: take sketch_entries = {size // SKETCH_SHARE}"
        )
    if settings.report != "sketch":
        return
    if settings.update == "best":
        raise ConfigError(
            'update = "best" weighs each tensor by its variance, and report = "sketch" mixes those of a slice: take '
            'report = "weights"'
        )
    if settings.rank_mode != "fixed":
        raise ConfigError(
            f'rank_mode = "{settings.rank_mode}" gives devices slices of unlike size, whose sketches cannot be added: '
            'take report = "weights"'
        )


def check_sketches(
    settings: TrainingSettings,
    optimizer: LocalOptimizer,
    manifest: Manifest,
    slices: Sequence[str],
    *,
    freeze_a: bool,
) -> None:
    """Check that sketches fit the slices of a package.

    Args:
        settings: settings of the training.
        optimizer: the device's own optimiser.
        manifest: the package's manifest.
        slices: names of the slices that are trained.
        freeze_a: whether LoRA's B alone is trained.

    Raises:
        ConfigError: the optimiser has no size for its moments, or a slice is no larger than its sketch.
    """
    if optimizer.name == "sgc" and not settings.sketch_size:
        raise ConfigError('local_optimizer "sgc" keeps sketches: set sketch_size and sketch_entries')
    for name in slices:
        numbers = trained_part(manifest.slice_named(name), freeze_a).dimensions
        if settings.sketch_size > numbers:
            raise ConfigError(
                f"sketch_size = {settings.sketch_size} is more than the {numbers} numbers of slice {name} of package "
                f"{manifest.name}, so nothing would be saved: take at most {numbers}, or leave sketches out"
            )


def _check_projection(settings: TrainingSettings) -> None:
    if settings.sums_projection and settings.head != "closed_form":
        raise ConfigError(
            f'sums_projection = {settings.sums_projection} belongs to head = "closed_form", not to "{settings.head}": '
            "leave it out"
        )
    if settings.sums_projection % PROJECTED_BLOCK:
        raise ConfigError(
            f"sums_projection = {settings.sums_projection} must be a multiple of {PROJECTED_BLOCK}; take "
            f"{max(1, round(settings.sums_projection / PROJECTED_BLOCK)) * PROJECTED_BLOCK}"
        )


def _check_exits(settings: TrainingSettings) -> None:
    """Steps that leave the model at unlike blocks share one head; their directions are drawn for what they reach."""
    exits = list(settings.exits)
    if exits != sorted(set(exits)) or exits[0] < 1:
        raise ConfigError(f"exits = {exits} must name blocks once and in order, from 1")
    if settings.features not in ((), settings.exits[-1:]):
        raise ConfigError(
            f"exits = {exits} say which block the head reads, and features = {list(settings.features)} says it too; "
            "leave features out"
        )
    if settings.update not in ("forward", "zero_order"):
        raise ConfigError(
            f'exits are for steps by forward mode, which run fewer blocks; update = "{settings.update}" must be '
            '"forward" or "zero_order"'
        )
    if settings.head == "closed_form":
        raise ConfigError('head = "closed_form" reads one set of blocks for all devices; leave exits out')
    if settings.directions == "filtered":
        raise ConfigError(
            'exits draw directions of other slices in each step, and "filtered" ones are compared with the last '
            'change of all; take other directions, such as "one_slice"'
        )


def _check_best(settings: TrainingSettings) -> None:
    """Contributions of unlike devices must have one mean, and each device must be able to give either kind."""
    if settings.head == "perturbed":
        raise ConfigError('update = "best" may perturb nothing: head = "perturbed" must be "exact"')
    if settings.report == "scalars":
        raise ConfigError(
            'update = "best" may have no directional derivatives to replay: report = "scalars" must be "weights"'
        )
    if settings.jvp_limit is not None:
        raise ConfigError(
            'update = "best" averages estimates with exact gradients, and clamped ones have another mean: leave out '
            f"jvp_limit = {settings.jvp_limit}"
        )
    if settings.directions == "filtered":
        raise ConfigError(
            'update = "best" averages estimates with exact gradients, and directions = "filtered" have another mean; '
            'take "one_slice" or "dealt"'
        )


def measures_line(task: Task) -> bool:
    """Whether a task's ``reference`` is the server's last step, along which the loss is to be measured."""
    forward = task.update == "forward" and task.head != "closed_form" and task.directions != "filtered"
    return forward and bool(task.slices) and task.reference is not None


def check_task(task: Task, manifest: Manifest) -> None:
    """Check a task's settings against its package.

    Raises:
        ConfigError: a setting does not suit the package's task or slices.
        PackageError: the task trains a head that the package does not have, or names an unknown slice.
    """
    if task.train_head and manifest.head is None:
        raise PackageError(
            f"package {manifest.name} has no head to train, the task asks for it; set train_head = false"
        )
    check_loss(task, manifest)
    check_features(task, manifest, task.slices)
    if task.head == "closed_form" and (task.slices or not task.features):
        raise ConfigError(
            f"task {task.task_id} gathers sums for a head in closed form: it must train no slice, and name features"
        )
    if task.slices:
        check_sketches(task, task.optimizer, manifest, task.slices, freeze_a=task.freeze_a)
    if task.rank_mode != "fixed" and task.slices:  # without slices the head warms up
        check_rank_mode(task, manifest, task.slices, task.optimizer)
    for kind in {manifest.slice_named(name).kind for name in task.slices}:
        if task.freeze_a and KINDS[kind].pair is None:
            raise ConfigError(
                f"freeze_a trains LoRA's B alone, and slices of package {manifest.name} are {kind}, which have none; "
                "set freeze_a = false or export with --slice lora"
            )


def check_rank_mode(
    settings: TrainingSettings, manifest: Manifest, slices: Sequence[str], optimizer: LocalOptimizer
) -> None:
    """Check that the slices can be held in part, where a run asks for that.

    Args:
        settings: settings of the training.
        manifest: the package's manifest.
        slices: names of the slices that are trained.
        optimizer: the device's own optimiser.

    Raises:
        ConfigError: a slice's rank is fixed, no slice is trained, or the optimiser moves what has no gradient.
    """
    if optimizer.name in ("adamw", "sgc"):
        raise ConfigError(
            f'rank_mode = "{settings.rank_mode}" moves some ranks in a step, and local_optimizer "{optimizer.name}" '
            'would move all by what it remembers; take "accumulate" or "sgd"'
        )
    if not slices:
        raise ConfigError(
            f'rank_mode = "{settings.rank_mode}" trains ranks of slices, and no slice is trained; '
            'take rank_mode = "fixed"'
        )
    for name in slices:
        kind = manifest.slice_named(name).kind
        if not KINDS[kind].rank_axes:
            raise ConfigError(
                f'rank_mode = "{settings.rank_mode}" needs LoRA, and slice {name} of package {manifest.name} is '
                f'{kind}; export it with --slice lora, or take rank_mode = "fixed"'
            )


def check_features(settings: TrainingSettings, manifest: Manifest, slices: Sequence[str]) -> None:
    """Check the blocks that a head reads against the package, and against the slices that are trained.

    Args:
        settings: settings of the training.
        manifest: the package's manifest, as it is in its file.
        slices: names of the slices that are trained.

    Raises:
        ConfigError: the package lacks such blocks, or has no head; or a slice lies behind all of them; or sums are to
            be projected to more numbers than there are.
    """
    blocks, width = settings.features, len(settings.features) * manifest.base.hidden_size
    with_block_head(manifest, blocks, settings.pooling)
    if blocks and settings.sums_projection >= width > 0:
        raise ConfigError(
            f"sums_projection = {settings.sums_projection} is not below the {width} features of a row, so nothing "
            "would be saved: leave it out, or take less"
        )
    for block in settings.exits:
        with_block_head(manifest, (block,), settings.pooling)
    if settings.exits and slices and all(manifest.slice_named(n).segment > settings.exits[0] for n in slices):
        raise ConfigError(
            f"no slice lies before block {settings.exits[0]}, the first of exits, so that steps to it would train "
            "none; name a later block, or train earlier slices"
        )
    for name in slices if blocks else ():
        if manifest.slice_named(name).segment > blocks[-1]:
            raise ConfigError(
                f"slice {name} is in block {manifest.slice_named(name).segment}, and the head reads none behind block "
                f"{blocks[-1]}: add a later block to features, or leave the slice out"
            )


def check_loss(settings: TrainingSettings, manifest: Manifest) -> None:
    """Check the loss against the package's task: a run is refused for it before a device is.

    Raises:
        ConfigError: the loss is of one prediction an example, and the package is a language model.
    """
    if settings.loss == "phuber" and manifest.task == "causal_lm":
        raise ConfigError(
            f'loss = "phuber" is of one prediction an example, package {manifest.name} makes one a token; '
            'take loss = "cross_entropy"'
        )
