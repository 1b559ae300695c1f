"""Starting the supervisor of a deployment, from a rank or from a program that calls `mii.serve`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from runners.contracts.errors import ConfigError
from runners.engines.mii.deployment.plan import FAILURE, DeploymentPlan
from runners.engines.mii.deployment.ports import listens, refuse_taken
from runners.engines.mii.deployment.registry import (
    SHUTDOWN_S,
    failure_reason,
    is_running,
    lock,
    remove_plans_of_killed,
    write_score_file,
)
from runners.protocol.process import child_environment

_LOG = "deployment.log"
"""What the processes of a detached deployment print, in the deployment's folder."""
_POLL_S = 0.2


def start(plan: DeploymentPlan, folder: Path, *, detached: bool) -> subprocess.Popen[bytes] | None:
    """Write a plan to its folder and start its supervisor; None if the deployment runs already.

    A detached deployment outlives this process: what is returned is the supervisor's parent, which
    exits at once. Any other deployment ends with this process, with the thread that called this,
    and with the pipe to its stdin. Raises: ConfigError for a port that is taken.
    """
    remove_plans_of_killed()
    descriptor = lock(folder)
    if descriptor is None:
        return None
    try:
        refuse_taken(plan.ports, patience_s=SHUTDOWN_S)
        write_score_file(plan, folder)
        path = plan.write(folder)
        (folder / FAILURE).unlink(missing_ok=True)
        return _start_supervisor(path, descriptor, detached=detached)
    finally:
        os.close(descriptor)  # the supervisor has inherited the lock


def wait_until_serving(plan: DeploymentPlan, folder: Path) -> None:
    """Wait until all of a deployment listens. Raises: ConfigError if it ends before that."""
    while not all(map(listens, plan.listening_ports)):
        if not is_running(folder):
            raise ConfigError(failure_reason(plan.name, folder))
        time.sleep(_POLL_S)


def _start_supervisor(path: Path, descriptor: int, *, detached: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "runners.engines.mii.deployment.supervisor", str(path)]
    with contextlib.ExitStack() as files:
        # A program that reads our output would otherwise wait for the deployment's end.
        log = files.enter_context(path.with_name(_LOG).open("wb")) if detached else None
        return subprocess.Popen(
            [*command, "--detached" if detached else str(os.getpid())],
            stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=child_environment(),
            start_new_session=True,
            pass_fds=[descriptor],
        )
