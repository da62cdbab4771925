"""What an export can be refused for by its files and options alone: within a second, without torch."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.engines.choice import engine_version
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import ModelError
from export.model.folder import check_model_folder


def check_early(
    model: Path,
    labels: tuple[str, ...],
    output: Path,
    engines: tuple[EngineName, ...],
    *,
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """Refuse what cannot be exported, before anything is loaded.

    Args:
        model: model folder.
        labels: label set; empty for a causal language model.
        output: folder that the export would create.
        engines: engines that devices may run the package on.
        trust_remote_code: whether Python code of the model folder's own may run.

    Returns:
        Sentences for people about what of the folder is not used, or used otherwise than its files say.

    Raises:
        ConfigError: an engine or another library is not installed; gives the install command.
        ModelError: the output exists, or the model folder cannot become a package.
    """
    for engine in engines:
        engine_version(engine)
    if output.exists():
        raise ModelError(f"{output} exists already; choose another --output or remove it")
    return check_model_folder(model, labels, trust_remote_code=trust_remote_code)
