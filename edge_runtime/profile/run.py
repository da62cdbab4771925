"""Profile a task: :func:`profile_package` runs it in a worker under the cap and writes the memory report.

This process stays small, without numpy and the engine: workers do the work, and it looks at them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.data.rows import count_rows
from edge_runtime.durable import write_durably
from edge_runtime.errors import (
    BudgetError,
    ConfigError,
    DataError,
    EdgeError,
    RegressionError,
)
from edge_runtime.package.prepared import PREPARED
from edge_runtime.profile.assemble import fill_profile
from edge_runtime.profile.document import (
    MAX_DOCUMENT_BYTES,
    Difference,
    Profile,
    compare,
    decode_profile,
    encode_profile,
)
from edge_runtime.profile.identity import identify
from edge_runtime.profile.measure import (
    Settings,
    compare_ways,
    new_run,
    prepare_for_request,
    prepared_folder,
    train_measured,
)
from edge_runtime.profile.page import render_page
from edge_runtime.profile.request import MAX_STEPS, MAX_THREADS, check_range
from edge_runtime.profile.text import difference_line, failure_lines, render_text
from edge_runtime.worker.jobs import TrainJob
from edge_runtime.worker.process import RunningWorker, start_worker


@dataclass(frozen=True)
class ProfileReport:
    """What was written.

    Attributes:
        profile: the report.
        difference: comparison with the earlier report; None if none was given, or if it is of other work.
        text: the whole report as text.
        paths: paths of page, document and text.
        error: reason why the command must fail; None if the run kept to its budget and did not regress.
    """

    profile: Profile
    difference: Difference | None
    text: str
    paths: tuple[Path, ...]
    error: EdgeError | None


def profile_package(
    settings: Settings, launch: Callable[[TrainJob], RunningWorker] = start_worker
) -> ProfileReport:
    """Run a task, try other ways to do it, and write the report.

    Whatever can be refused is refused before anything runs. The files are written last, each as a whole.

    Args:
        settings: task to run, and place of the report.
        launch: function that starts a worker on the task.

    Raises:
        ConfigError: a setting cannot be used.
        EdgeError: the package cannot be prepared, or the task was refused or failed for a reason other than memory.
    """
    # 1. Check what can be checked.
    old = _earlier(settings.against)
    rows = _check(settings)
    identify(
        settings.request.package,
        settings.request.planner().arithmetic,
        settings.command,
        settings.request.engine,
    )
    settings.request.package.verify_files()

    # 2. Prepare the package, run the task, and what it is compared with.
    request = prepare_for_request(settings)
    with tempfile.TemporaryDirectory(prefix="edge-profile-") as name:
        run = new_run(settings, request, rows, Path(name))
        train_measured(run, launch)
        ways = compare_ways(run, settings.model, Path(name))

    # 3. Write it down.
    profile = fill_profile(run, settings.request.work, settings.command, ways)
    difference, unlike = _against(old, profile, settings.tolerance)
    text, paths = _write(profile, difference, settings.output)
    error = run.killed or _broken_budget(profile) or unlike or _regression(difference)
    return ProfileReport(profile, difference, text, paths, error)


def _earlier(path: Path | None) -> Profile | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return decode_profile(file.read(MAX_DOCUMENT_BYTES + 1))
    except OSError as error:
        raise ConfigError(f"cannot read the earlier report {path}: {error.strerror}") from error


def _check(settings: Settings) -> int:
    """Check that everything can be run and written.

    Returns:
        The number of rows.
    """
    check_range("--steps", settings.steps, MAX_STEPS)
    check_range("--threads", settings.threads, MAX_THREADS)
    if settings.micro_batch is not None:
        check_range("--micro-batch", settings.micro_batch, settings.request.work.batch_size)
    if not 0 <= settings.tolerance <= 10:
        raise ConfigError(f"--tolerance is {settings.tolerance}; it may be 0 to 10")
    if not settings.output.name or not settings.output.parent.is_dir():
        raise ConfigError(f"--output {settings.output}: there is no folder {settings.output.parent}")
    if settings.model is not None and not settings.model.is_dir():
        raise ConfigError(f"--model {settings.model} is not a folder")
    folder = prepared_folder(settings)
    if folder.exists() and not (folder / PREPARED).is_file():
        raise ConfigError(
            f"{folder} holds no prepared package, and would be replaced by one; name another place"
        )
    rows = count_rows(settings.data)
    if rows == 0:
        raise DataError(f"{settings.data} is empty; it needs at least one row")
    return rows


def _against(
    old: Profile | None, new: Profile, tolerance: float
) -> tuple[Difference | None, ConfigError | None]:
    """The comparison with an earlier report, or the error that prevents it; the report is written in either case."""
    if old is None:
        return None, None
    try:
        return compare(old, new, tolerance), None
    except ConfigError as error:
        return None, error


def _write(profile: Profile, difference: Difference | None, output: Path) -> tuple[str, tuple[Path, ...]]:
    """Write page, document and text, each as a whole, after all of them could be made."""
    text = render_text(profile, difference)
    contents = {
        ".html": render_page(profile, difference).encode(),
        ".json": encode_profile(profile),
        ".txt": text.encode(),
    }
    paths = tuple(output.with_name(output.name + ending) for ending in contents)
    for path, content in zip(paths, contents.values(), strict=True):
        write_durably(path, content)
    return text, paths


def _broken_budget(profile: Profile) -> BudgetError | None:
    if profile.verdict == "PASS":
        return None
    return BudgetError(f"the run did not keep to its budget: {' '.join(failure_lines(profile))}")


def _regression(difference: Difference | None) -> RegressionError | None:
    if difference is None or not difference.regressed:
        return None
    return RegressionError(difference_line(difference))
