"""Prometheus metrics of the HTTP worker, on BentoML's `/metrics`.

The state of the runners is read at each scrape and appended as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from bentoml._internal.server.metrics.prometheus import PrometheusClient
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.admission import Admission
from runners.contracts.runner import Runner

_ORIGINAL = "triptych.scope"
NO_ROUTE = "other"
"""The label `route` of paths that no route matches."""

REQUESTS = Counter(
    "triptych_requests",
    "HTTP requests by status; 499: the client disconnected",
    ["route", "status"],
)
DURATION = Histogram(
    "triptych_request_duration_seconds",
    "Seconds from the arrival of a request to the end of its response",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
SEQUENCES = Counter(
    "triptych_sequences", "Finished sequences by finish reason", ["route", "finish_reason"]
)
PROMPT_TOKENS = Counter("triptych_prompt_tokens", "Accepted prompt tokens", ["route"])
TASK_INPUTS = Counter("triptych_task_inputs", "Completed inputs of pipeline tasks", ["route"])
GENERATED_TOKENS = Counter("triptych_generated_tokens", "Generated tokens", ["route"])
FIRST_TOKEN = Histogram(
    "triptych_time_to_first_token_seconds",
    "Seconds from the arrival of a request to the first token of a sequence",
    ["route"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 60.0),
)
PER_TOKEN = Histogram(
    "triptych_time_per_output_token_seconds",
    "Mean seconds between the tokens of a sequence",
    ["route"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 2.0),
)
IMAGES = Counter("triptych_pictures", "Requested images by outcome", ["route", "outcome"])
DENOISING_STEPS = Counter("triptych_denoising_steps", "Completed denoising steps", ["route"])


def keep_in_memory() -> None:
    """Keep all metrics in this process; to be called before any of them has a value.

    BentoML has its workers write into mapped files, to sum them up: there is one worker only, a
    full disk would kill it (SIGBUS), and two servers with one home would share the files.
    """
    values.ValueClass = values.MutexValue
    BentoMLContainer.metrics_client.set(PrometheusClient(multiproc=False))
    disable_created_metrics()  # type: ignore[no-untyped-call]


class RouteLabels:
    """The values of the label `route`: the templates of an app's routes, up to a parameter.

    Other paths share one value: with a value for each, a scanner would exhaust the memory.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        parts = [template.partition("/{") for template in _templates(routes)]
        self._labels = {label for label, _, _ in parts}
        self._prefixes = {label for label, _, parameter in parts if parameter}

    def label(self, path: str) -> str:
        """The value for a path."""
        if path in self._labels:
            return path
        prefixes = (prefix for prefix in self._prefixes if path.startswith(f"{prefix}/"))
        return max(prefixes, key=len, default=NO_ROUTE)


class _LabelledByRoute:
    """BentoML's metrics of requests, with our labels: it has a label for each path it ever saw."""

    def __init__(self, app: ASGIApp, *, metrics: Middleware, labels: RouteLabels) -> None:
        async def with_path(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope[_ORIGINAL], receive, send)

        self.app: ASGIApp = metrics.cls(with_path, *metrics.args, **metrics.kwargs)
        self.labels = labels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = self.labels.label(scope["path"]) if "path" in scope else ""
        await self.app({**scope, "path": path, _ORIGINAL: scope}, receive, send)


def label_by_route(app: Starlette) -> None:
    """Replace BentoML's label of paths; to be called before the app serves."""
    labels = RouteLabels(app.routes)
    for index, middleware in enumerate(app.user_middleware):
        cls: object = middleware.cls
        if cls is RunnerTrafficMetricsMiddleware:
            app.user_middleware[index] = Middleware(
                _LabelledByRoute, metrics=middleware, labels=labels
            )


def _templates(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[str]:
    for route in routes:
        if isinstance(route, Mount):
            yield from _templates(route.routes, prefix + route.path)
        elif isinstance(route, Route):
            yield prefix + route.path


class RunnerMetrics:
    """The runners' state as gauges; a prometheus_client collector. An image counts as a sequence.

    Each runner comes with the admission of its model.
    """

    def __init__(self, runners: Sequence[tuple[Runner[Any, Any], Admission]]) -> None:
        self._runners = runners

    def collect(self) -> list[Metric]:
        """The current gauges."""
        gauges: dict[str, GaugeMetricFamily] = {}
        for runner, admission in self._runners:
            for name, (text, value) in _state(runner, admission).items():
                if name not in gauges:
                    gauges[name] = GaugeMetricFamily(f"triptych_{name}", text, labels=["model"])
                gauges[name].add_metric([runner.name], value)
        return list(gauges.values())

    def text(self) -> str:
        """The gauges in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry).decode()


def _state(runner: Runner[Any, Any], admission: Admission) -> dict[str, tuple[str, float]]:
    """The help text and the value of each gauge, by its name."""
    health = runner.health()
    return {
        "ready": ("1 if the model serves requests, else 0", health.ready),
        "restarts": ("Restarts of the rank group", health.restarts),
        "admitted_sequences": ("Admitted sequences, running and queued", admission.admitted),
        "admission_limit": ("Maximum of admitted sequences", admission.limit),
        "running_sequences": ("Sequences in the current batch", health.running),
        "waiting_sequences": ("Sequences queued for the batch", health.waiting),
        "kv_tokens_used": ("Used KV cache in tokens", health.kv_tokens_used),
        "kv_tokens_total": ("Size of the KV cache in tokens", health.kv_tokens_total),
    }
