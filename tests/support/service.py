"""The whole service with its middlewares in this process, over runners that are fakes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from _bentoml_impl.tasks import Sqlite3Store  # type: ignore[import-untyped]
from starlette.testclient import TestClient

from tests.support.fake_runner import FakeChatRunner, FakeImageRunner


@contextmanager
def serving(folder: Path) -> Iterator[TestClient]:
    """A client of the service, which has started; `folder` gets the database of its jobs.

    There can be only one in a process, because BentoML registers its metrics each time.
    """
    jobs = str(folder / "results.db")
    with pytest.MonkeyPatch.context() as patch:
        # What importing the service sets if it is not set yet.
        patch.setenv("BENTOML_DISABLE_GPU_ALLOCATION", "1")
        patch.setenv("BENTOML_RESULT_STORE", jobs)
        service: Any = importlib.import_module("service")
        runners = service.Runners(text=FakeChatRunner(), image=FakeImageRunner())
        patch.setattr(service, "chosen_runners", lambda *_: runners)
        Sqlite3Store.init_db(jobs)  # as `bentoml serve` does
        client = TestClient(service.Triptych.to_asgi())
        client.__enter__()
    try:
        yield client
    finally:
        client.__exit__()
