"""The processes of `bentoml serve`: the server, and the HTTP worker that it starts and restarts."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from typing import Any

import bentoml
import click
from bentoml._internal.configuration.containers import BentoMLContainer

from api.http.async_tasks import forget_lost_jobs
from runners.contracts.errors import ConfigError
from runners.protocol.folders import check_room, process_folder
from runners.protocol.process import die_with_parent

logger = logging.getLogger("triptych.service")

_SERVER_PID = "_TRIPTYCH_SERVER_PID"
"""The environment variable by which a worker knows its server."""


def prepare_server(name: str) -> None:
    """Before a worker of the service `name` starts: refuse what would end it with a traceback.

    Raises: ConfigError.
    """
    # Missing where BentoML does not start the worker.
    services = BentoMLContainer.config.get().get("services", {})
    workers = services.get(name, {}).get("workers")
    if workers not in (None, 1):
        raise ConfigError(
            f"services.{name}.workers is {workers} in BentoML's configuration and must be 1: each "
            "HTTP worker would load the models again, and count its own requests only"
        )
    options = _command_line()
    if options.get("api_workers") not in (None, 1):
        logger.warning("BentoML ignores --api-workers: there is one HTTP worker")
    check_room()
    if "port" in options:
        _refuse_taken_port(
            options.get("host") or BentoMLContainer.http.host.get(),
            options["port"] or BentoMLContainer.http.port.get(),
        )
    # BentoML keeps a folder there, and leaves it behind when it is killed.
    tempfile.tempdir = str(process_folder())
    os.environ[_SERVER_PID] = str(os.getpid())


def prepare_worker() -> None:
    """In a worker of BentoML, end with the server, however that ends, and forget lost jobs.

    Does nothing in a process that BentoML did not start, such as a replica of Ray Serve.
    """
    if bentoml.server_context.worker_index is not None:
        die_with_parent(int(os.environ.get(_SERVER_PID, os.getppid())))
        tempfile.tempdir = str(process_folder())
        forget_lost_jobs()


def _command_line() -> dict[str, Any]:
    """The options of `bentoml serve`; empty if the server was started by other means."""
    context = click.get_current_context(silent=True)
    return {} if context is None else context.params


def _refuse_taken_port(host: str, port: int) -> None:
    """Raises: ConfigError if another process listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {host} cannot be used: {error.strerror}") from None
