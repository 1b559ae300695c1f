"""Prometheus metrics, on BentoML's `/metrics`.

Counters and histograms go through prometheus_client's multiprocess files, which BentoML's endpoint
reads. The state of the runner is asked for at each scrape instead and appended as text: a gauge in
those files would be as old as its last update, and would outlive its worker.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from api.http.admission import Admission
from runners.contracts.runner import Runner

FILES = "PROMETHEUS_MULTIPROC_DIR"
if FILES in os.environ:
    # BentoML sets it, in workers only, to a folder in its home, which each `bentoml serve` empties:
    # of two servers with one home the older would lose its metrics. So each worker has its own.
    os.environ[FILES] = tempfile.mkdtemp(prefix="triptych-metrics-")


def remove_files() -> None:
    """Leave nothing on disk; the process is about to end."""
    if FILES in os.environ:
        shutil.rmtree(os.environ[FILES], ignore_errors=True)


ROUTES = frozenset(
    {
        "/generate",
        "/generate_stream",
        "/tokenize",
        "/detokenize",
        "/generate_image",
        "/generate_image_task",
        "/generate_image_task/submit",
        "/generate_image_task/status",
        "/generate_image_task/get",
        "/generate_image_task/retry",
        "/tasks/fill-mask",
        "/tasks/token-classification",
        "/tasks/question-answering",
        "/tasks/text-classification",
        "/tasks/conversational",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/images/generations",
        "/v1/models",
    }
)
"""Values of the label `route`."""
NO_ROUTE = "other"
"""Its value for all else, or a scanner would fill the memory."""
TORCHSERVE = frozenset({"/ping", "/predictions", "/models"})
"""TorchServe's, each for all that lies below it, too."""

REQUESTS = Counter(
    "triptych_requests", "HTTP requests; status 499: the client left", ["route", "status"]
)
DURATION = Histogram(
    "triptych_request_duration_seconds",
    "Arrival to the end of the answer",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
SEQUENCES = Counter("triptych_sequences", "Sequences by how they ended", ["route", "finish_reason"])
PROMPT_TOKENS = Counter("triptych_prompt_tokens", "Prompt tokens accepted", ["route"])
TASK_INPUTS = Counter("triptych_task_inputs", "Inputs of tasks answered", ["route"])
GENERATED_TOKENS = Counter("triptych_generated_tokens", "Tokens generated", ["route"])
FIRST_TOKEN = Histogram(
    "triptych_time_to_first_token_seconds",
    "Arrival of the request to the first token of a sequence",
    ["route"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 60.0),
)
PER_TOKEN = Histogram(
    "triptych_time_per_output_token_seconds",
    "Mean time between the tokens of a sequence",
    ["route"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 2.0),
)


PICTURES = Counter("triptych_pictures", "Pictures by how they ended", ["route", "outcome"])
DENOISING_STEPS = Counter("triptych_denoising_steps", "Denoising steps of pictures", ["route"])


def route_label(path: str) -> str:
    """The path if it is one of ours, or what stands for it."""
    top = "/" + path.lstrip("/").partition("/")[0]
    return path if path in ROUTES else top if top in TORCHSERVE else NO_ROUTE


class RunnerMetrics:
    """The runners' state as gauges; a prometheus_client collector. A picture is a sequence, too."""

    def __init__(self, runners: Sequence[tuple[Runner[Any, Any], Admission]]) -> None:
        self._runners = runners

    def collect(self) -> list[Metric]:
        """The gauges as they are right now."""
        gauges: dict[str, GaugeMetricFamily] = {}
        for runner, admission in self._runners:
            for name, (meaning, value) in _state(runner, admission).items():
                if name not in gauges:
                    gauges[name] = GaugeMetricFamily(f"triptych_{name}", meaning, labels=["model"])
                gauges[name].add_metric([runner.name], value)
        return list(gauges.values())

    def text(self) -> str:
        """The gauges in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry).decode()


def _state(runner: Runner[Any, Any], admission: Admission) -> dict[str, tuple[str, float]]:
    health = runner.health()
    return {
        "ready": ("1 while requests are served", health.ready),
        "restarts": ("Times the rank group was started again", health.restarts),
        "admitted_sequences": ("Sequences in the house", admission.inside),
        "admission_limit": ("Sequences that may be in the house", admission.limit),
        "running_sequences": ("Sequences being generated", health.running),
        "waiting_sequences": ("Sequences that wait for room", health.waiting),
        "kv_tokens_used": ("KV cache in use, in tokens", health.kv_tokens_used),
        "kv_tokens_total": ("KV cache there is, in tokens", health.kv_tokens_total),
    }
