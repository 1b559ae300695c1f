"""What a deployment is made of, as a file that its processes read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from runners.contracts.errors import ConfigError
from runners.engines.mii.deployment.places import free_port
from runners.protocol.spec import write_private

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
    weights: str = ""
    """Stands for the files the model is loaded from, see `fingerprint`."""

    def differs(self, other: DeploymentPlan) -> list[str]:
        """In what another deployment would answer differently; ports and threads aside."""
        mine, theirs = self._serves(), other._serves()
        return [key for key in sorted(mine | theirs) if mine.get(key) != theirs.get(key)]

    def _serves(self) -> dict[str, Any]:
        sizes = [len(replica.gpu_indices) for replica in self.replicas]
        threads = {"num_threads": None}
        own = {**self.model_config, **self.settings, **threads, "weights": self.weights}
        own |= {"replica_num": len(sizes), "tensor_parallel": sizes[0]}
        own["enable_restful_api"] = self.rest_port is not None
        # As it is once it was in a file.
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(own))
        return plain

    @property
    def doors(self) -> list[int]:
        """The ports that listen once the deployment serves."""
        return [self.port, *(replica.port for replica in self.replicas)]

    @property
    def ports(self) -> list[int]:
        """All of its ports."""
        inner = [p for r in self.replicas for p in (r.torch_dist_port, r.zmq_port)]
        return [*self.doors, *inner, *([] if self.rest_port is None else [self.rest_port])]

    def write(self, folder: Path) -> Path:
        """Write it where only this user can read it, whole or not at all; returns the file."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / PLAN
        write_private(path, self)
        return path


def fingerprint(model: Path) -> str:
    """Stands for what a model is loaded from: names, sizes and times of its files."""
    kinds = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*")
    files = sorted(file for kind in kinds for file in model.glob(kind))
    seen = [(f.name, s.st_size, s.st_mtime_ns) for f in files for s in (f.stat(),)]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def read_plan(path: Path) -> DeploymentPlan:
    """The plan in a file. Raises: OSError, ValueError."""
    return msgspec.json.decode(path.read_bytes(), type=DeploymentPlan)


LOCAL = frozenset({"", "localhost", "127.0.0.1"})


def plan_replicas(
    given: Sequence[Mapping[str, Any]],
    device_map: Any,
    *,
    replicas: int,
    ranks: int,
    torch_dist_port: int | None,
    zmq_port: int | None,
) -> list[ReplicaPlan]:
    """Where replicas of `ranks` ranks run: as MII's ReplicaConfigs say, else on ports counted from
    the two given, those that are taken or not given being free ones.

    Raises: ConfigError for devices that do not fit, and for other machines.
    """
    if any(own["hostname"] not in LOCAL for own in given):
        raise ConfigError("replica_configs: replicas run on this machine only")
    devices = _devices(device_map, replicas, ranks)
    planned = []
    for i in range(replicas):
        own = given[i] if given else {}
        ports = own.get("tensor_parallel_ports") or [free_port()]
        gpus = own.get("gpu_indices") or devices[i]
        if len(gpus) != ranks:
            raise ConfigError(f"replica_configs: replica {i} must have {ranks} gpu_indices")
        planned.append(
            ReplicaPlan(
                port=ports[0],
                torch_dist_port=own.get("torch_dist_port")
                or free_port(torch_dist_port and torch_dist_port + 100 * i),
                zmq_port=own.get("zmq_port") or free_port(zmq_port and zmq_port + i),
                gpu_indices=list(gpus),
            )
        )
    return planned


def _devices(device_map: Any, replicas: int, ranks: int) -> list[list[int]]:
    """GPU indices of each replica's ranks, in any of the forms that MII takes."""
    if device_map == "auto":
        return [list(range(i * ranks, (i + 1) * ranks)) for i in range(replicas)]
    if isinstance(device_map, int):
        device_map = [device_map]
    if isinstance(device_map, Mapping):
        if not set(device_map) <= LOCAL:
            raise ConfigError("device_map: replicas run on this machine only")
        slots = [list(each) for host in device_map.values() for each in host]
    elif device_map and isinstance(device_map[0], int):
        slots = [list(device_map)]
    else:
        slots = [list(each) for each in device_map]
    if [len(each) for each in slots] != [ranks] * replicas:
        raise ConfigError(f"device_map must name {ranks} devices for each of {replicas} replicas")
    return slots


FATAL = 3
"""Exit status of a process that can never run, however often it is started."""


FAILURE = "failure.txt"
"""Beside the plan: why."""


def environment(replica: ReplicaPlan, rank: int, threads: int) -> dict[str, str]:
    """What MII's launcher would set for a rank of a replica."""
    ranks = str(len(replica.gpu_indices))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "LOCAL_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(replica.torch_dist_port),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, replica.gpu_indices)),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
