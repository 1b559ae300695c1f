"""One machine: a Compose file, and the same as one `docker run`."""

from __future__ import annotations

import shlex
from typing import Any

from deploy.plan import HOME, MODELS, Plan
from runners.errors import ConfigError
from settings import PREFIX

# Compiled kernels are executed, which Docker forbids in a tmpfs unless told; podman knows no owner.
TMPFS = [f"{folder}:exec,mode=1777" for folder in (HOME, "/tmp")]  # noqa: S108


def compose_file(plan: Plan) -> dict[str, Any]:
    """A Compose file. Raises: ConfigError for what one machine can not do."""
    _one_machine(plan)
    environment: dict[str, str | None] = dict(plan.container_environment())
    if plan.options.api_key_secret:
        environment[f"{PREFIX}API_KEY"] = None  # handed through
    service: dict[str, Any] = {
        "image": plan.image,
        "command": plan.command,
        "environment": environment,
        "ports": [f"{plan.settings.port}:{plan.settings.port}"],
        "read_only": True,
        "tmpfs": TMPFS,
        "shm_size": f"{plan.shm_gib}gb",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
        "stop_grace_period": f"{plan.stop_s}s",
        "healthcheck": {
            "test": ["CMD", "curl", "-fs", _ready(plan)],
            "interval": "10s",
            "timeout": "5s",
            "start_period": f"{plan.start_s}s",
        },
        "deploy": {"resources": _resources(plan)},
    }
    if plan.options.model_volume:
        service["volumes"] = [f"{plan.options.model_volume}:{MODELS}:ro"]
    return {"name": plan.options.name, "services": {"triptych": service}}


def run_command(plan: Plan) -> str:
    """The command line that runs the image with Docker. Raises: as `compose_file`."""
    _one_machine(plan)
    port = plan.settings.port
    options = [
        ["--name", plan.options.name],
        ["--publish", f"{port}:{port}"],
        *(["--env", f"{name}={value}"] for name, value in plan.container_environment().items()),
        *([["--env", f"{PREFIX}API_KEY"]] if plan.options.api_key_secret else []),
        *([["--gpus", str(plan.gpus)]] if plan.gpus else []),
        ["--memory", f"{plan.memory_gib}g"],
        ["--shm-size", f"{plan.shm_gib}g"],
        ["--read-only"],
        *(["--tmpfs", mount] for mount in TMPFS),
        *([["--volume", f"{v}:{MODELS}:ro"]] if (v := plan.options.model_volume) else []),
        ["--cap-drop", "ALL"],
        ["--security-opt", "no-new-privileges"],
        ["--stop-timeout", str(plan.stop_s)],
        ["--health-cmd", shlex.join(["curl", "-fs", _ready(plan)])],
        ["--health-interval", "10s"],
        ["--health-start-period", f"{plan.start_s}s"],
        [plan.image, *plan.command],
    ]
    return " \\\n  ".join(["docker run --rm", *map(shlex.join, options)])


def _one_machine(plan: Plan) -> None:
    if plan.nnodes > 1:
        raise ConfigError(
            f"the model is spread over {plan.nnodes} machines, which only kubernetes is rendered "
            "for: set TRIPTYCH_NNODES=1, or choose it"
        )
    if not (plan.options.bento or plan.options.model_volume):
        raise ConfigError(
            "where are the models? Name a bento that has them (--bento), or the folder in which "
            "each has its own (--model-volume)"
        )


def _resources(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {"limits": {"memory": f"{plan.memory_gib}gb"}}
    if plan.gpus:
        gpus = {"driver": "nvidia", "count": plan.gpus, "capabilities": ["gpu"]}
        found["reservations"] = {"devices": [gpus]}
    return found


def _ready(plan: Plan) -> str:
    return f"http://127.0.0.1:{plan.settings.port}/readyz"
