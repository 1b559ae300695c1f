"""Where deployments are known by name: a private folder for each, with its plan and its lock.

A deployment's supervisor holds the lock for as long as it lives. Whether a deployment runs is asked
of the lock and never of a port, on which any other program may listen.

The lock is a `flock`, taken before the supervisor starts and inherited by it as an open descriptor.
filelock cannot hand a lock on: its `release` unlocks the open file, which both processes share.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from runners.contracts.errors import ConfigError
from runners.engines.mii.deployment.plan import FAILURE, PLAN, DeploymentPlan, read_plan
from runners.protocol.cache import CacheUnavailable, cache_folder, refuse_shared

VARIABLE = "MII_CACHE_PATH"
SHUTDOWN_S = 5.0
"""How long a deployment may take to end once it was terminated or its rank was lost."""
_LOCK = "lock"
_POLL_S = 0.2


def private_cache() -> Path:
    """The folder where MII keeps a file for each deployment, which its clients execute.

    It is `MII_CACHE_PATH`, which is set to a folder in the user's cache if it is not set.
    Raises: ConfigError if other users can write there.
    """
    try:
        if VARIABLE not in os.environ:
            os.environ[VARIABLE] = str(cache_folder("mii"))
        folder = Path(os.environ[VARIABLE])
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        refuse_shared(folder)
    except CacheUnavailable as error:
        raise ConfigError(
            f"must be a private folder, because files in it are executed: {error}", field=VARIABLE
        ) from None
    folder.chmod(0o700)
    return folder


def deployment_folder(name: str) -> Path:
    """The folder of a deployment. Raises: ConfigError for a name that leads out of the cache."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"{name} is a path to another folder", field="deployment_name")
    return private_cache() / name


def lock(folder: Path) -> int | None:
    """A new file descriptor that holds a deployment's lock; None while the deployment runs."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_running(folder: Path) -> bool:
    """Whether a deployment has a supervisor."""
    descriptor = lock(folder)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def wait_until_stopped(name: str, folder: Path) -> None:
    """Wait for a deployment that is ending. Raises: ConfigError if it still runs after that."""
    deadline = time.monotonic() + SHUTDOWN_S
    while is_running(folder):
        if time.monotonic() > deadline:
            raise already_running(name, folder)
        time.sleep(_POLL_S)


def find_plan(folder: Path) -> DeploymentPlan | None:
    """A deployment's plan; None without a readable one."""
    try:
        return read_plan(folder / PLAN)
    except (OSError, ValueError):
        return None


def remove_plans_of_killed() -> None:
    """Remove the plans whose supervisors were killed, which could not do so."""
    for plan in private_cache().glob(f"**/{PLAN}"):
        descriptor = lock(plan.parent)
        if descriptor is not None:
            plan.unlink(missing_ok=True)
            os.close(descriptor)


def already_running(name: str, folder: Path) -> ConfigError:
    """The error for a second deployment of the same name."""
    plan = find_plan(folder)
    address = f" with mii.host 127.0.0.1 and mii.port_number {plan.port}" if plan else ""
    return ConfigError(
        f"deployment {name} is already running: terminate it, choose another "
        f"mii.deployment_name, or connect to it{address}"
    )


def failure_reason(name: str, folder: Path) -> str:
    """Why a deployment ended while it was starting, as one sentence."""
    try:
        return (folder / FAILURE).read_text()
    except OSError:
        return f"deployment {name} ended while it was starting; see its log"


def write_score_file(plan: DeploymentPlan, folder: Path) -> None:
    """Write the Python module with MIIConfig's values by which `mii.client(name)` finds it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    values = {
        "deployment_name": plan.name,
        "deployment_type": "local",
        "model_conf": plan.model_config,
        "port_number": plan.port,
        "enable_restful_api": plan.rest_port is not None,
        "restful_api_host": plan.rest_host,
        "restful_api_port": plan.rest_port or 51080,
    }
    (folder / "score.py").write_text(f"mii_config = {values!r}\n", encoding="utf-8")
