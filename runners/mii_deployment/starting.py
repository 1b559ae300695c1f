"""Starting a deployment, and finding one that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from runners.mii_deployment.launch import FAILURE
from runners.mii_deployment.places import listens
from runners.mii_deployment.plan import PLAN, DeploymentPlan, read_plan
from runners.ranks.life import PRIVATE_VARIABLES, PROJECT_ROOT

LOG = "deployment.log"
"""Beside the plan: what the processes of a deployment print that outlives its maker."""


def start(plan: DeploymentPlan, folder: Path, *, outlives: bool) -> subprocess.Popen[bytes]:
    """Start the process that keeps a deployment, with its plan in `folder`.

    Unless it `outlives` this process, it goes when this process, the thread that called this, or
    the pipe to its stdin does.
    """
    path = plan.write(folder)
    (folder / FAILURE).unlink(missing_ok=True)
    search = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
    env = {k: v for k, v in os.environ.items() if k not in PRIVATE_VARIABLES}
    command = [sys.executable, "-m", "runners.mii_deployment.keeper", str(path)]
    log = (folder / LOG).open("wb") if outlives else None
    return subprocess.Popen(
        [*command, "--detached" if outlives else str(os.getpid())],
        stdin=subprocess.DEVNULL if outlives else subprocess.PIPE,
        # Whoever reads our output would wait for its end.
        stdout=log,
        stderr=log,
        env=env | {"PYTHONPATH": search},
        start_new_session=True,
    )


def running(folder: Path) -> DeploymentPlan | None:
    """The deployment that runs by the plan in `folder`, if one does."""
    try:
        plan = read_plan(folder / PLAN)
    except (OSError, ValueError):
        return None
    return plan if listens(plan.port) else None


def why_ended(name: str, folder: Path) -> str:
    """Why a deployment that was started ended, as one sentence."""
    try:
        return (folder / FAILURE).read_text()
    except OSError:
        return f"deployment {name} ended while it was started; the log says more"
