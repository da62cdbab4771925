"""The release that a device uses: fetched, checked on the device's own rows, and only then made the current one.

The check comes before the switch. A release that falls below its operator's limits is never used, and whoever predicts
goes on with the one before; there is nothing to take back.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.agent import decisions
from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.downloads import Downloads
from edge_runtime.agent.own_rows import count_own_rows
from edge_runtime.agent.store import Store, TakenRelease
from edge_runtime.errors import EdgeError
from edge_runtime.log import note
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import is_current
from edge_runtime.protocol.messages import DeviceEvent, Release, SignedRelease
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome, Job, PrepareJob, PrepareOutcome
from edge_runtime.worker.process import RunningWorker, finish_worker


def take_release(
    signed: SignedRelease,
    *,
    coordinator_key: str,
    setup: str,
    config: DeviceConfig,
    store: Store,
    downloads: Downloads,
    launch: Callable[[Job], RunningWorker],
) -> DeviceEvent | None:
    """Decide about a release that the coordinator told of, and use it if it is good.

    Args:
        signed: the release.
        coordinator_key: public key that must have signed it.
        setup: what the device is set up with, as its check-ins say.
        config: the device's configuration.
        store: the device's state folder, locked by this process.
        downloads: the way to package and values.
        launch: function that starts a worker.

    Returns:
        What operators want to know; None if the device has decided about it before.

    Raises:
        EdgeError: something went wrong that may pass, such as a coordinator that does not answer, or a full disk; the
            device has not decided.
        OSError: likewise.
    """
    release = None
    try:
        release = decisions.open_release(signed, coordinator_key)
        if release.number <= store.releases.state().decided_with(setup):
            return None
        note("release_received", number=release.number, round=release.round, package=release.package)
        taken = _checked(release, config, store, downloads, launch)
    except EdgeError as error:
        if decisions.may_pass(error):
            raise
        return _refused(store, release, error, setup)
    reason = decisions.below_limits(taken)
    if reason is not None:
        store.releases.refuse(release.number)
        return decisions.describe_refused_release(release, reason, store.releases.state().current)
    store.releases.switch_to(taken, downloads.blob(release.values, 0))
    return decisions.describe_taken_release(taken)


def _refused(store: Store, release: Release | None, error: EdgeError, setup: str) -> DeviceEvent:
    """The event of a release that the device cannot use as it is; one that nobody trusts counts as not told of."""
    if release is None:
        return decisions.describe("release_untrusted", error, None)
    store.releases.refuse(release.number, setup)
    reason = decisions.describe("", error, None).message
    return decisions.describe_refused_release(release, reason, store.releases.state().current)


def _checked(
    release: Release,
    config: DeviceConfig,
    store: Store,
    downloads: Downloads,
    launch: Callable[[Job], RunningWorker],
) -> TakenRelease:
    """The release, fetched and prepared, with what it scores on the device's own rows, if there are any."""
    package, (values,), _ = downloads.package(
        release.package,
        release.package_signature,
        (release.values,),
        lambda manifest: decisions.admit_files(manifest, config),
    )
    prepared = store.prepared_folder(release.package)
    if not is_current(prepared, release.package, config.arithmetic, config.engine):
        job = _prepare_job(config, package, str(prepared))
        outcome = finish_worker(launch(job), PrepareOutcome)
        note("prepared", package=release.package, arithmetic=outcome.arithmetic, seconds=outcome.seconds)
    reading = config.reading("evaluation", store.split_key())
    if config.data is None or count_own_rows(config, "evaluation", store.split_key(), launch) == 0:
        return TakenRelease(release)
    check = EvaluateJob(
        package_folder=str(package.folder),
        package_sha256=release.package,
        prepared_folder=str(prepared),
        state_path=str(values),
        data_path=str(config.data),
        sequence_limit=release.sequence_limit,
        cap_bytes=config.cap,
        threads=config.engine_threads,
        engine=config.engine,
        reading=reading,
        features=release.features,
        pooling=release.pooling,
    )
    scores = finish_worker(launch(check), EvaluateOutcome)
    return TakenRelease(release, scores.accuracy, scores.mean_loss, scores.rows)


def _prepare_job(config: DeviceConfig, package: Package, prepared_folder: str) -> PrepareJob:
    return PrepareJob(
        package_folder=str(package.folder),
        package_sha256=package.sha256,
        prepared_folder=prepared_folder,
        cap_bytes=config.cap,
        threads=config.engine_threads,
        arithmetic=config.arithmetic,
        engine=config.engine,
    )
