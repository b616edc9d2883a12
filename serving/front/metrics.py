"""What Prometheus asks for. Children are looked up once for each model, version and code, not for each request."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from serving.bundle import Bundle

REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
QUEUE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KEPT_VERSIONS = 4
"""Of each model; the series of older ones end, so that a server that reloads for years does not grow."""
CONTENT_TYPE = CONTENT_TYPE_LATEST.encode()


class VersionMetrics:
    """The children of one version of a model."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self.model, self.version = model, version
        self._metrics = metrics
        self._codes: dict[int, Callable[[], None]] = {}
        self._labels: dict[str, Callable[[], None]] = {}
        self._tokens: dict[str, Callable[[float], None]] = {}
        self._first_token: Callable[[float], None] | None = None
        self._between: Callable[[float], None] | None = None
        self.seconds: Callable[[float], None] = metrics.seconds.labels(model, version).observe
        self.batch_size: Callable[[float], None] = metrics.batch_size.labels(model, version).observe
        self.queue_seconds: Callable[[float], None] = metrics.queue_seconds.labels(model, version).observe
        self.run_seconds: Callable[[float], None] = metrics.run_seconds.labels(model, version).observe

    def answered(self, status: int, seconds: float) -> None:
        """A request has its answer."""
        count = self._codes.get(status)
        if count is None:
            child = self._metrics.requests.labels(self.model, self.version, str(status))
            count = self._codes[status] = child.inc
        count()
        self.seconds(seconds)

    def predicted(self, label: str) -> None:
        """A sample was given this label."""
        count = self._labels.get(label)
        if count is None:
            count = self._labels[label] = self._metrics.predictions.labels(self.model, self.version, label).inc
        count()

    def tokens(self, kind: str, count: int) -> None:
        """A language model has read (`prompt`) or made (`completion`) tokens."""
        child = self._tokens.get(kind)
        if child is None:
            child = self._tokens[kind] = self._metrics.tokens_read.labels(self.model, self.version, kind).inc
        child(count)

    def first_token(self, seconds: float) -> None:
        """The first token of an answer was there this long after its request."""
        self._first_token = self._first_token or self._metrics.first_seconds.labels(self.model, self.version).observe
        self._first_token(seconds)

    def between_tokens(self, seconds: float) -> None:
        """Time between two tokens of an answer."""
        self._between = self._between or self._metrics.between_seconds.labels(self.model, self.version).observe
        self._between(seconds)

    def remove(self) -> None:
        """End the series."""
        metrics, names = self._metrics, (self.model, self.version)
        for status in self._codes:
            metrics.requests.remove(*names, str(status))
        for label in self._labels:
            metrics.predictions.remove(*names, label)
        for kind in self._tokens:
            metrics.tokens_read.remove(*names, kind)
        if self._first_token is not None:
            metrics.first_seconds.remove(*names)
        if self._between is not None:
            metrics.between_seconds.remove(*names)
        for family in (metrics.seconds, metrics.batch_size, metrics.queue_seconds, metrics.run_seconds):
            family.remove(*names)


class Metrics:
    """All families, and the workers' observer."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a series more for each child, which nobody asks for
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        version = ["model", "version"]

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, version, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self.requests = counter("serving_requests", "Requests answered; 499: the client hung up.", [*version, "code"])
        self.predictions = counter("serving_predictions", "Samples by the label given to them.", [*version, "label"])
        self.reloads = counter("serving_reloads", "Reloads of a bundle.", ["result"])
        self.events = counter("serving_worker_events", "What happened to workers.", ["model", "event"])
        self.seconds = histogram(
            "serving_request_seconds", "From a request's first byte to its answer.", REQUEST_BUCKETS
        )
        self.batch_size = histogram("serving_batch_size", "Samples that ran at once.", BATCH_BUCKETS)
        self.queue_seconds = histogram("serving_queue_seconds", "A request's wait for a worker.", QUEUE_BUCKETS)
        self.run_seconds = histogram("serving_run_seconds", "A batch's time at the worker.", QUEUE_BUCKETS)
        self.tokens_read = counter("serving_tokens", "Tokens that language models read and make.", [*version, "kind"])
        self.first_seconds = histogram(
            "serving_time_to_first_token_seconds", "From a request to its answer's first token.", REQUEST_BUCKETS
        )
        self.between_seconds = histogram(
            "serving_inter_token_seconds", "Between two tokens of an answer.", REQUEST_BUCKETS
        )
        for result in ("done", "failed"):
            self.reloads.labels(result)
        self._versions: dict[str, dict[str, VersionMetrics]] = {}
        self.nobody = self.of("", "")
        """Requests that are no model's: unknown paths, malformed ones."""

    def of(self, model: str, version: str) -> VersionMetrics:
        """The children of a version, made when it is first seen."""
        versions = self._versions.setdefault(model, {})
        found = versions.get(version)
        if found is None:
            found = versions[version] = VersionMetrics(self, model, version)
            while len(versions) > KEPT_VERSIONS:
                versions.pop(next(iter(versions))).remove()
        return found

    def batch(self, model: str, version: str, size: int, queue_seconds: Sequence[float], run_seconds: float) -> None:
        found = self.of(model, version)
        found.batch_size(size)
        found.run_seconds(run_seconds)
        for seconds in queue_seconds:
            found.queue_seconds(seconds)

    def tokens(self, model: str, version: str, kind: str, count: int) -> None:
        self.of(model, version).tokens(kind, count)

    def first_token(self, model: str, version: str, seconds: float) -> None:
        self.of(model, version).first_token(seconds)

    def between_tokens(self, model: str, version: str, seconds: float) -> None:
        self.of(model, version).between_tokens(seconds)

    def worker(self, model: str, event: str, detail: str) -> None:
        self.events.labels(model, event).inc()
        if event != "up":
            print(f"serving: {model}: a worker is {event}: {detail}", file=sys.stderr, flush=True)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class Gauges:
    """What is looked up at the moment of asking."""

    def __init__(self, models: Mapping[str, Any], lost_lines: Callable[[], int]) -> None:
        """`models`: served models by name, with `bundle` and `state`."""
        self._models, self._lost_lines = models, lost_lines

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        in_flight = GaugeMetricFamily("serving_requests_in_flight", "Requests without an answer yet.", labels=["model"])
        queue = GaugeMetricFamily("serving_queue_length", "Samples that wait.", labels=["model"])
        workers = GaugeMetricFamily("serving_workers", "Processes that run models.", labels=["model", "state"])
        restarts = CounterMetricFamily("serving_worker_restarts", "Workers started again.", labels=["model"])
        ready = GaugeMetricFamily("serving_ready", "1 while the model takes requests.", labels=["model"])
        info = GaugeMetricFamily(
            "serving_bundle_info", "What is served.", labels=["model", "version", "lineage", "run"]
        )
        for name, model in self._models.items():
            state, bundle = model.state, model.bundle
            in_flight.add_metric([name], state.outstanding)
            queue.add_metric([name], state.queue_length)
            workers.add_metric([name, "up"], state.workers_up)
            workers.add_metric([name, "wanted"], state.workers_wanted)
            restarts.add_metric([name], state.restarts)
            ready.add_metric([name], float(state.ready))
            info.add_metric([name, bundle.version, _text(bundle, "lineage"), _text(bundle, "id")], 1)
        lost = CounterMetricFamily("serving_request_log_lost_lines", "Lines of the request log that were not written.")
        lost.add_metric([], self._lost_lines())
        return [in_flight, queue, workers, restarts, ready, info, lost]


def _text(bundle: Bundle, key: str) -> str:
    return str(bundle.run.get(key) or "")
