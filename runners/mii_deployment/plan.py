"""What a deployment is made of, as a file that its processes read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

PLAN = "deployment.json"


class ReplicaPlan(msgspec.Struct, frozen=True):
    """One copy of the model."""

    port: int
    """gRPC port of its first rank."""
    torch_dist_port: int
    zmq_port: int
    gpu_indices: list[int]
    """One per rank."""


class DeploymentPlan(msgspec.Struct, frozen=True):
    """A deployment. All ports are on loopback, but for the REST gateway's."""

    name: str
    port: int
    """Where the load balancer listens."""
    model_config: dict[str, Any]
    """MII's ModelConfig."""
    replicas: list[ReplicaPlan]
    settings: dict[str, Any] = {}
    """See `loading.settings`."""
    rest_host: str = "localhost"
    rest_port: int | None = None
    """None: no REST gateway."""
    rest_limit: int = 32

    def write(self, folder: Path) -> Path:
        """Write it where only this user can read it, whole or not at all; returns the file."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / PLAN
        temporary = path.with_suffix(f".{os.getpid()}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(msgspec.json.encode(self))
        temporary.replace(path)
        return path


def read_plan(path: Path) -> DeploymentPlan:
    """The plan in a file. Raises: OSError, ValueError."""
    return msgspec.json.decode(path.read_bytes(), type=DeploymentPlan)
