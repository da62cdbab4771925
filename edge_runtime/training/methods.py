"""Which training settings go together: checked where a run is configured, and again where a task is done.

Nothing here needs numpy, so that the agent and the coordinator's configuration can call it.
"""

from __future__ import annotations

from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.package.manifest import Manifest
from edge_runtime.protocol.messages import PER_EXAMPLE, Task, TrainingSettings


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
    if settings.candidates > 1 and settings.directions != "filtered":
        raise ConfigError(
            f'candidates = {settings.candidates} belongs to directions = "filtered", not to "{settings.directions}"'
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
    kinds = {manifest.slice_named(name).kind for name in task.slices}
    if task.freeze_a and "lora_xs" in kinds:
        raise ConfigError(
            f"freeze_a trains LoRA's B alone, and slices of package {manifest.name} are lora_xs, which have none; "
            "set freeze_a = false or export with --slice lora"
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
