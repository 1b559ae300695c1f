"""Ports of a deployment: choosing free ones, and asking whether one is in use."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable

from runners.contracts.errors import ConfigError

LOOPBACK = "127.0.0.1"
_POLL_S = 0.1

_assigned: set[int] = set()
"""Every port that `free_port` has returned in this process."""


def free_port(preferred: int | None = None) -> int:
    """A port on loopback that is free and that this process was not given before.

    It is `preferred` if that is one, else the kernel's choice.
    """
    port = preferred if preferred is not None and _is_free(preferred) else 0
    while not port or port in _assigned:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = int(probe.getsockname()[1])
    _assigned.add(port)
    return port


def refuse_taken(ports: Iterable[int], *, patience_s: float) -> None:
    """Wait until all `ports` are free on loopback.

    Raises: ConfigError for a port that occurs twice or is still taken after `patience_s` seconds.
    """
    deadline, seen = time.monotonic() + patience_s, set[int]()
    for port in ports:
        if port in seen:
            raise ConfigError(f"port {port} is used twice: the ports of a deployment must differ")
        seen.add(port)
        while not _is_free(port):
            if time.monotonic() > deadline:
                raise port_taken(port)
            time.sleep(_POLL_S)


def port_taken(port: int) -> ConfigError:
    """The error for a port on which another process listens."""
    return ConfigError(
        f"port {port} is taken: choose another one, or leave it out to have a free one chosen"
    )


def listens(port: int, host: str = LOOPBACK) -> bool:
    """Whether a process accepts connections there. Raises: ConfigError if `host` has no address."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except socket.gaierror:
        raise ConfigError(f"{host} has no address", field="mii.host") from None
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
