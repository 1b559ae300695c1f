"""Starting a deployment, and finding one that runs.

What keeps a deployment holds a lock on its folder for as long as it lives, and no longer: whether
a deployment runs is asked of the lock, never of a port, where a stranger may listen.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

from runners.contracts.errors import ConfigError
from runners.engines.mii.deployment.places import listens, refuse_taken
from runners.engines.mii.deployment.plan import FAILURE, PLAN, DeploymentPlan, read_plan
from runners.protocol.process import child_environment

LOG = "deployment.log"
"""Beside the plan: what the processes of a deployment print that outlives its maker."""
LOCK = "lock"
"""Beside the plan: held by what keeps the deployment."""
LEAVING_S = 5.0
"""How long a deployment may take to end that was told to, or whose rank was lost."""
POLL_S = 0.2


def start(plan: DeploymentPlan, folder: Path, *, outlives: bool) -> subprocess.Popen[bytes] | None:
    """Start the process that keeps a deployment, with its plan in `folder`. None if a deployment
    runs there already.

    Unless it `outlives` this process, it goes when this process, the thread that called this, or
    the pipe to its stdin does. Raises: ConfigError for a port that is taken.
    """
    lock = _lock(folder)
    if lock is None:
        return None
    try:
        (folder / PLAN).unlink(missing_ok=True)  # of one that could not remove it
        refuse_taken(plan.ports, patience_s=LEAVING_S)
        write_score_file(plan, folder)
        path = plan.write(folder)
        (folder / FAILURE).unlink(missing_ok=True)
        return _keeper(path, lock, outlives=outlives)
    finally:
        os.close(lock)  # the keeper has inherited it


def _keeper(path: Path, lock: int, *, outlives: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "runners.engines.mii.deployment.supervisor", str(path)]
    with contextlib.ExitStack() as files:
        # Whoever reads our output would wait for its end.
        log = files.enter_context(path.with_name(LOG).open("wb")) if outlives else None
        return subprocess.Popen(
            [*command, "--detached" if outlives else str(os.getpid())],
            stdin=subprocess.DEVNULL if outlives else subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=child_environment(),
            start_new_session=True,
            pass_fds=[lock],
        )


def wait_until_serving(plan: DeploymentPlan, folder: Path) -> None:
    """Until all of a deployment that was started listens. Raises: ConfigError if it ends before."""
    while not all(map(listens, plan.doors)):
        if not runs(folder):
            raise ConfigError(why_ended(plan.name, folder))
        time.sleep(POLL_S)


def wait_until_gone(name: str, folder: Path) -> None:
    """Until a deployment that is ending has ended. Raises: ConfigError if it goes on."""
    gone_by = time.monotonic() + LEAVING_S
    while runs(folder):
        if time.monotonic() > gone_by:
            raise runs_already(name, folder)
        time.sleep(POLL_S)


def runs(folder: Path) -> bool:
    """Whether a deployment is kept by the plan in `folder`."""
    lock = _lock(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def found(folder: Path) -> DeploymentPlan | None:
    """The plan in `folder`, if there is one."""
    try:
        return read_plan(folder / PLAN)
    except (OSError, ValueError):
        return None


def runs_already(name: str, folder: Path) -> ConfigError:
    """What is wrong when one more of a name is asked for."""
    plan = found(folder)
    where = f" with mii.host 127.0.0.1 and mii.port_number {plan.port}" if plan else ""
    return ConfigError(
        f"a deployment {name} runs already: terminate it, give this one another "
        f"mii.deployment_name, or connect to that one{where}"
    )


def why_ended(name: str, folder: Path) -> str:
    """Why a deployment that was started ended, as one sentence."""
    try:
        return (folder / FAILURE).read_text()
    except OSError:
        return f"deployment {name} ended while it was started; the log says more"


def write_score_file(plan: DeploymentPlan, folder: Path) -> None:
    """What stock `mii.client(name)` finds a deployment by: a module with MIIConfig's values."""
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


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds the lock, or None if another does."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
