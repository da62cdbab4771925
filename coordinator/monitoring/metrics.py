"""Metrics in Prometheus' text format: what the database says, and what this process has counted and timed.

Names follow Prometheus' conventions: base units (seconds, bytes), ``_total`` for what only grows. What the database
holds is the same from whichever process it is read; requests, refusals and times are those of this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from coordinator.storage.monitor_rows import Figures
from edge_runtime import __version__

#: Content type of the text format that :meth:`Metrics.text` writes.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Bounds of durations, in seconds: a check-in takes milliseconds, a commit of many results minutes.
REQUEST_BUCKETS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
AGGREGATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0)


class Metrics:
    """Instruments of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Histogram(
            "edge_http_request_seconds",
            "Time from a request's headers to the end of its answer",
            ("method", "route", "status"),
            buckets=REQUEST_BUCKETS_S,
            registry=self._registry,
        )
        self._refusals = Counter(
            "edge_http_refusals",
            "Requests that were refused, by the code of the refusal",
            ("code",),
            registry=self._registry,
        )
        self._bytes = Counter(
            "edge_body_bytes",
            "Body bytes on the device API, up from devices and down to them",
            ("direction",),
            registry=self._registry,
        )
        self._aggregations = Histogram(
            "edge_round_aggregation_seconds",
            "Time from the last result of a round to its commit",
            buckets=AGGREGATION_BUCKETS_S,
            registry=self._registry,
        )
        self._transactions = Histogram(
            "edge_database_transaction_seconds",
            "Time of a transaction of requests, which may hold the work of several",
            buckets=REQUEST_BUCKETS_S,
            registry=self._registry,
        )
        self._waiting = Gauge(
            "edge_database_waiting", "Pieces of work that wait for the database", registry=self._registry
        )
        Gauge("edge_build", "Always 1", ("version",), registry=self._registry).labels(__version__).set(1)

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count and time a request; ``route`` is the path as it was declared, so that ids make no series."""
        self._requests.labels(method, route, str(status)).observe(seconds)

    def note_refusal(self, code: str) -> None:
        """Count a refusal."""
        self._refusals.labels(code).inc()

    def note_bytes(self, *, up_bytes: int = 0, down_bytes: int = 0) -> None:
        """Count body bytes of devices."""
        self._bytes.labels("up").inc(up_bytes)
        self._bytes.labels("down").inc(down_bytes)

    def note_aggregation(self, seconds: float) -> None:
        """Time the aggregation of a round."""
        self._aggregations.observe(seconds)

    def transaction(self) -> AbstractContextManager[object]:
        """Time a transaction."""
        return self._transactions.time()

    def text(self, figures: Figures, *, waiting: int, database_bytes: Mapping[str, int]) -> bytes:
        """All metrics in the text format.

        Args:
            figures: what the database says.
            waiting: number of pieces of work that wait for the database.
            database_bytes: sizes of the database's files, by what they are.
        """
        self._waiting.set(waiting)
        told = CollectorRegistry()
        told.register(_Told(figures, database_bytes))
        return generate_latest(self._registry) + generate_latest(told)


class _Told:
    """What the database says, as metric families (a prometheus_client collector)."""

    def __init__(self, figures: Figures, database_bytes: Mapping[str, int]) -> None:
        self._figures = figures
        self._database_bytes = database_bytes

    def collect(self) -> Iterator[Metric]:
        """Each family with its samples."""
        figures = self._figures
        devices = GaugeMetricFamily(
            "edge_devices", "Devices that ever enrolled", labels=("device_class", "state")
        )
        for (kind, state), count in sorted(figures.devices.items()):
            devices.add_metric((kind, state), count)
        yield devices
        yield _by(
            "edge_devices_not_eligible", "Devices that may not work now", "reason", figures.not_eligible
        )
        yield _by("edge_runs", "Runs", "state", figures.runs)
        yield _by("edge_rounds", "Rounds of all runs", "state", figures.rounds)
        yield _by("edge_tasks", "Tasks of all runs", "state", figures.tasks)
        yield _by("edge_tasks_lapsed", "Tasks that came to nothing", "reason", figures.lapsed)
        traffic = CounterMetricFamily(
            "edge_round_bytes", "Body bytes that passed while rounds were open", labels=("direction",)
        )
        traffic.add_metric(("up",), figures.bytes_up)
        traffic.add_metric(("down",), figures.bytes_down)
        yield traffic
        yield GaugeMetricFamily("edge_releases", "Releases published", value=figures.releases)
        yield _by("edge_database_bytes", "Sizes of the database's files", "file", self._database_bytes)
        yield from self._open_runs()

    def _open_runs(self) -> Iterator[Metric]:
        labels = ("run_id", "name")
        figures = (
            ("edge_run_rounds_committed", "Committed rounds of a run that goes on", "committed"),
            ("edge_run_abandoned_in_a_row", "Rounds abandoned since its last commit", "abandoned_in_a_row"),
            ("edge_run_paused", "1 while the operator has paused it", "paused"),
            ("edge_run_accuracy", "Accuracy at its newest evaluation", "accuracy"),
            ("edge_run_loss", "Mean loss at its newest evaluation", "mean_loss"),
        )
        for name, text, field in figures:
            family = GaugeMetricFamily(name, text, labels=labels)
            for run in self._figures.open_runs:
                value = getattr(run, field)
                if value is not None:
                    family.add_metric((run.run_id, run.name), value)
            yield family


def _by(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for word, count in sorted(counts.items()):
        family.add_metric((word,), count)
    return family
