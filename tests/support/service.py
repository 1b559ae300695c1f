"""The whole service with its middlewares in this process, over runners that are fakes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from _bentoml_impl.tasks import Sqlite3Store  # type: ignore[import-untyped]
from bentoml._internal.configuration.containers import BentoMLContainer
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient


@contextmanager
def serving(folder: Path, **runners: object) -> Iterator[TestClient]:
    """A client of the service, which has started; `folder` gets what it writes."""
    jobs, metrics = str(folder / "results.db"), folder / "metrics"
    with pytest.MonkeyPatch.context() as patch:
        # What importing the service sets if it is not set yet.
        patch.setenv("BENTOML_DISABLE_GPU_ALLOCATION", "1")
        patch.setenv("BENTOML_RESULT_STORE", jobs)
        service: Any = importlib.import_module("service")
        patch.setattr(service, "chosen_runners", lambda *_: service.Runners(**runners))
        Sqlite3Store.init_db(jobs)  # as `bentoml serve` does
        metrics.mkdir()
        patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(metrics))
        # Its metrics can be registered once only, and other tests may serve in this process, too.
        bentoml_metrics = BentoMLContainer.metrics_client.get()
        assert bentoml_metrics.registry is not None  # reading it sets its process id
        patch.setattr(bentoml_metrics, "_registry", CollectorRegistry())
        with TestClient(service.Triptych.to_asgi()) as client:
            yield client
