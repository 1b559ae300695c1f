"""Where deployments are known by name, and ports nobody has."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from runners.contracts.errors import ConfigError
from runners.protocol.cache import CacheUnavailable, cache_folder, refuse_shared

VARIABLE = "MII_CACHE_PATH"


def private_cache() -> Path:
    """The folder in which MII keeps a file per deployment, and executes it: nobody else's.

    `MII_CACHE_PATH` if it is set, else one of ours, which the variable names from then on.
    Raises: ConfigError if others may write there.
    """
    try:
        if VARIABLE not in os.environ:
            os.environ[VARIABLE] = str(cache_folder("mii"))
        folder = Path(os.environ[VARIABLE])
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        refuse_shared(folder)
    except CacheUnavailable as error:
        raise ConfigError(f"{VARIABLE}: files there are executed: {error}") from None
    folder.chmod(0o700)
    return folder


def deployment_folder(name: str) -> Path:
    """Where a deployment is known by its name. Raises: ConfigError for one that leads elsewhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"deployment_name: {name} is not a name, but a path to elsewhere")
    return private_cache() / name


def free_port(wanted: int | None = None) -> int:
    """`wanted` if nobody listens there, else a port of the kernel's choice, on loopback; none that
    this process was given before."""
    port = wanted if wanted is not None and _free(wanted) else 0
    while not port or port in _given:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
    _given.add(port)
    return port


_given: set[int] = set()


def refuse_taken(ports: Iterable[int], *, patience_s: float) -> None:
    """Raises: ConfigError for a port on loopback that is given twice, or still taken after
    `patience_s`."""
    given_up, seen = time.monotonic() + patience_s, set[int]()
    for port in ports:
        if port in seen:
            raise ConfigError(f"port {port} is given twice: each needs one of its own")
        seen.add(port)
        while not _free(port):
            if time.monotonic() > given_up:
                raise taken(port)
            time.sleep(0.1)


def taken(port: int) -> ConfigError:
    """What is wrong when somebody else listens there."""
    return ConfigError(f"port {port} is taken: give another, or none to have a free one")


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody accepts connections there. Raises: ConfigError if `host` has no address."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except socket.gaierror:
        raise ConfigError(f"mii.host: {host} has no address") from None
    except OSError:
        return False
    return True


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
