"""One machine: a Compose file, and the same container as one `docker run` command."""

from __future__ import annotations

import re
import shlex
from typing import Any

from deploy.plan import HOME, MODELS, Plan
from settings import variable

# Compiled kernels are executed, which Docker forbids in a tmpfs by default. Podman cannot set the
# owner of a tmpfs, so everybody may write.
TMPFS = [f"{folder}:exec,mode=1777" for folder in (HOME, "/tmp")]  # noqa: S108

VOLUME_NAME = re.compile(r"[a-zA-Z0-9][\w.-]*")
"""Docker takes this for the name of a volume; a folder begins with `/`, `.` or `~`."""


def compose_file(plan: Plan) -> dict[str, Any]:
    """A Compose file. Raises: ConfigError if one machine cannot run the plan."""
    content: dict[str, Any] = {"name": plan.options.name, "services": {"triptych": _service(plan)}}
    if VOLUME_NAME.fullmatch(volume := plan.options.model_volume):
        # Compose would otherwise create an empty volume.
        content["volumes"] = {volume: {"external": True}}
    return content


def run_command(plan: Plan) -> str:
    """The `docker run` command of the image. Raises: ConfigError, as `compose_file`."""
    service = _service(plan)
    health = service["healthcheck"]
    options = [
        ["--name", plan.options.name],
        *(["--publish", ports] for ports in service["ports"]),
        *(
            ["--env", name if value is None else f"{name}={value}"]
            for name, value in service["environment"].items()
        ),
        *([["--gpus", str(plan.gpus)]] if plan.gpus else []),
        ["--memory", service["deploy"]["resources"]["limits"]["memory"]],
        ["--shm-size", service["shm_size"]],
        ["--read-only"],
        *(["--tmpfs", mount] for mount in service["tmpfs"]),
        *(["--volume", volume] for volume in service.get("volumes", [])),
        *(["--cap-drop", capability] for capability in service["cap_drop"]),
        *(["--security-opt", option] for option in service["security_opt"]),
        ["--stop-timeout", str(plan.stop_s)],
        ["--health-cmd", shlex.join(health["test"][1:])],
        *([f"--health-{k.replace('_', '-')}", v] for k, v in health.items() if k != "test"),
        [service["image"], *service["command"]],
    ]
    return " \\\n  ".join(["docker run --rm", *map(shlex.join, options)])


def _service(plan: Plan) -> dict[str, Any]:
    plan.require_one_node("Docker")
    plan.require_models("a folder or a volume")
    port = plan.settings.port
    environment: dict[str, str | None] = dict(plan.container_environment())
    if plan.options.api_key:
        environment[variable("api_key")] = None  # from the shell that starts it
    ready = f"http://127.0.0.1:{port}/readyz"
    service: dict[str, Any] = {
        "image": plan.image,
        "command": plan.command,
        "environment": environment,
        "ports": [f"{port}:{port}"],
        "read_only": True,
        "tmpfs": TMPFS,
        "shm_size": f"{plan.shm_gib}g",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "restart": "unless-stopped",
        "stop_grace_period": f"{plan.stop_s}s",
        "healthcheck": {
            "test": ["CMD", "curl", "-fs", ready],
            "interval": "10s",
            "timeout": "5s",
            "start_period": f"{plan.start_s}s",
        },
        "deploy": {"resources": _resources(plan)},
    }
    if plan.options.model_volume:
        service["volumes"] = [f"{plan.options.model_volume}:{MODELS}:ro"]
    return service


def _resources(plan: Plan) -> dict[str, Any]:
    resources: dict[str, Any] = {"limits": {"memory": f"{plan.memory_gib}g"}}
    if plan.gpus:
        gpus = {"driver": "nvidia", "count": plan.gpus, "capabilities": ["gpu"]}
        resources["reservations"] = {"devices": [gpus]}
    return resources
