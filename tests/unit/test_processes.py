"""What `bentoml serve` checks before it starts its worker, and what ties the worker to it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import click
import pytest
from bentoml._internal.configuration.containers import BentoMLContainer

from api.http import processes
from api.http.processes import prepare_server, prepare_worker
from runners.contracts.errors import ConfigError


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is set here stays."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(processes, "process_folder", lambda: tmp_path)
    monkeypatch.setenv("_TRIPTYCH_SERVER_PID", "0")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on loopback that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def served_with(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """`prepare_server` as `bentoml serve` with these options calls it."""
    context = click.Context(click.Command("serve"))
    context.params = {"host": None, "port": None, "api_workers": None} | options
    with context:
        prepare_server("triptych")


@pytest.mark.parametrize("workers", [2, "cpu_count"])
def test_one_worker_is_the_rule(workers: object, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BentoMLContainer.config.get()
    for value in (1, workers):
        services = {"services": {"triptych": {"workers": value}}}
        monkeypatch.setattr(BentoMLContainer.config, "get", lambda s=services: config | s)
        if value == 1:
            prepare_server("triptych")
        else:
            with pytest.raises(ConfigError, match=f"triptych.workers is {workers} .* must be 1"):
                prepare_server("triptych")


def test_an_option_that_bentoml_ignores_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served_with(monkeypatch, host="127.0.0.1", port=0, api_workers=1)
    assert not caplog.messages
    served_with(monkeypatch, host="127.0.0.1", port=0, api_workers=2)
    assert "--api-workers" in caplog.text


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    with pytest.raises(ConfigError, match=rf"port {taken} on 127.0.0.1 .* in use"):
        served_with(monkeypatch, host="127.0.0.1", port=taken)
    with pytest.raises(ConfigError, match=f"port {taken} on "):
        served_with(monkeypatch, host="0.0.0.0", port=taken)


def test_a_worker_ends_with_the_server_that_started_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another process that imports the service is tied to nobody."""
    parents: list[int] = []
    monkeypatch.setattr(processes, "die_with_parent", parents.append)
    prepare_worker()
    assert parents == []
    assert tempfile.tempdir is None
    prepare_server("triptych")
    monkeypatch.setattr(bentoml.server_context, "worker_index", 1)
    prepare_worker()
    assert parents == [os.getpid()]
    assert tempfile.gettempdir() == str(tmp_path)
