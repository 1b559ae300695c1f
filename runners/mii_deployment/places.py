"""Where deployments are known by name, and ports nobody has."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from runners.errors import ConfigError

VARIABLE = "MII_CACHE_PATH"


def private_cache() -> Path:
    """The folder in which MII keeps a file per deployment, and executes it: nobody else's.

    `MII_CACHE_PATH` if it is set, else one of ours, which the variable names from then on.
    Raises: ConfigError if others may write there.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.setdefault(VARIABLE, str(home / "triptych" / "mii")))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{VARIABLE}: what lies in {folder} is executed, but others than you may write there"
        )
    folder.chmod(0o700)
    return folder


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


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
