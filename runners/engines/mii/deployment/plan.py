"""The plan of a deployment: its processes, ports and model, as a file that all of them read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from runners.config.base import BaseRunnerConfig
from runners.config.mii import MIISection
from runners.contracts.errors import ConfigError
from runners.engines.mii.deployment.ports import free_port
from runners.protocol.spec import write_private

PLAN = "deployment.json"
FAILURE = "failure.txt"
"""The file beside the plan that says why the deployment cannot run."""
FATAL = 3
"""Exit status of a process that would fail again if it were restarted."""
ENGINE_FIELDS = (
    *("dtype", "cpu_kernels", "attention_kernel", "kv_cache_dtype"),
    *("weight_quantization", "prefix_caching", "num_threads"),
)
"""The fields of Triptych's config that MII's config lacks and the CPU engine uses."""

_LOCAL_HOSTS = frozenset({"", "localhost", "127.0.0.1"})


def _default(field: str) -> float:
    return float(BaseRunnerConfig.model_fields[field].default)


class ReplicaPlan(msgspec.Struct, frozen=True):
    """One copy of the model."""

    port: int
    """gRPC port of its first rank."""
    torch_dist_port: int
    zmq_port: int
    gpu_indices: list[int]
    """One for each rank."""


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds after which a process is taken for hung; the fields of Triptych's config."""

    start_timeout: float = _default("start_timeout")
    heartbeat_timeout: float = _default("heartbeat_timeout")
    step_timeout: float = _default("step_timeout")


class DeploymentPlan(msgspec.Struct, frozen=True):
    """A deployment. All ports are on loopback except the REST gateway's."""

    name: str
    port: int
    """Where the load balancer listens."""
    model_config: dict[str, Any]
    """Values of MII's ModelConfig."""
    replicas: list[ReplicaPlan]
    settings: dict[str, Any] = {}
    """Values of `ENGINE_FIELDS`."""
    rest_host: str = "localhost"
    rest_port: int | None = None
    """None: no REST gateway."""
    rest_limit: int = 32
    """Requests that the REST gateway serves at once."""
    weights: str = ""
    """A digest of the files of the model; see `weights_digest`."""
    timeouts: Timeouts = Timeouts()

    def differences(self, other: DeploymentPlan) -> list[str]:
        """The fields in which another deployment would answer differently, in order of name.

        Ports, numbers of threads and timeouts do not count.
        """
        first, second = self._served_values(), other._served_values()
        return [key for key in sorted(first | second) if first.get(key) != second.get(key)]

    def _served_values(self) -> dict[str, Any]:
        rank_counts = [len(replica.gpu_indices) for replica in self.replicas]
        values = {
            **self.model_config,
            **self.settings,
            "num_threads": None,
            "weights": self.weights,
            "replica_num": len(rank_counts),
            "tensor_parallel": rank_counts[0],
            "enable_restful_api": self.rest_port is not None,
        }
        # The other plan may come from a file, which has lists for tuples.
        decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(values))
        return decoded

    @property
    def listening_ports(self) -> list[int]:
        """The gRPC ports, which accept connections once the deployment serves."""
        return [self.port, *(replica.port for replica in self.replicas)]

    @property
    def ports(self) -> list[int]:
        """All ports."""
        inner = [p for r in self.replicas for p in (r.torch_dist_port, r.zmq_port)]
        rest = [] if self.rest_port is None else [self.rest_port]
        return [*self.listening_ports, *inner, *rest]

    def write(self, folder: Path) -> Path:
        """Write the plan for this user only, whole or not at all; returns the file."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / PLAN
        write_private(path, self)
        return path


def read_plan(path: Path) -> DeploymentPlan:
    """The plan in a file. Raises: OSError, ValueError."""
    return msgspec.json.decode(path.read_bytes(), type=DeploymentPlan)


def weights_digest(model: Path) -> str:
    """A digest of the names, sizes and times of the files that a model is loaded from."""
    patterns = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*")
    files = sorted(file for pattern in patterns for file in model.glob(pattern))
    stats = [(f.name, s.st_size, s.st_mtime_ns) for f in files for s in (f.stat(),)]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def plan_deployment(
    deployment: MIISection,
    model: MIISection,
    *,
    name: str,
    ranks: int,
    model_config: dict[str, Any],
    settings: Mapping[str, Any] | None = None,
    weights: str = "",
    timeouts: Timeouts = Timeouts(),  # noqa: B008 - it is immutable
) -> DeploymentPlan:
    """The plan of a deployment whose replicas have `ranks` ranks each.

    `deployment` and `model` have the fields of MII's MIIConfig and ModelConfig, which are the same
    section of Triptych's config. Ports that they leave out are free ones. `model_config`,
    `settings`, `weights` and `timeouts` go into the plan as they are. Raises: ConfigError.
    """
    rest_port = None
    if deployment.enable_restful_api:
        rest_port = deployment.restful_api_port or free_port()
    return DeploymentPlan(
        name=name,
        port=deployment.port_number or free_port(),
        model_config=model_config,
        replicas=plan_replicas(
            [replica.model_dump() for replica in model.replica_configs],
            model.device_map,
            replicas=model.replica_num,
            ranks=ranks,
            torch_dist_port=model.torch_dist_port,
            zmq_port=model.zmq_port_number,
        ),
        settings=dict(settings or {}),
        rest_host=deployment.restful_api_host,
        rest_port=rest_port,
        rest_limit=deployment.restful_processes,
        weights=weights,
        timeouts=timeouts,
    )


def plan_replicas(
    replica_configs: Sequence[Mapping[str, Any]],
    device_map: Any,
    *,
    replicas: int,
    ranks: int,
    torch_dist_port: int | None,
    zmq_port: int | None,
) -> list[ReplicaPlan]:
    """Where `replicas` replicas of `ranks` ranks run.

    Devices and ports are those of MII's ReplicaConfigs where there are any. Else devices follow
    `device_map`, and ports are counted from the two arguments; a port that is taken or None is
    replaced by a free one. Raises: ConfigError for devices that do not fit, and for other machines.
    """
    if any(config["hostname"] not in _LOCAL_HOSTS for config in replica_configs):
        raise ConfigError("replicas run on this machine only", field="replica_configs")
    devices = _devices(device_map, replicas, ranks)
    plans = []
    for i in range(replicas):
        config = replica_configs[i] if replica_configs else {}
        grpc_ports = config.get("tensor_parallel_ports") or [free_port()]
        gpus = config.get("gpu_indices") or devices[i]
        if len(gpus) != ranks:
            raise ConfigError(f"replica {i} must have {ranks} gpu_indices", field="replica_configs")
        plans.append(
            ReplicaPlan(
                port=grpc_ports[0],
                torch_dist_port=config.get("torch_dist_port")
                or free_port(torch_dist_port and torch_dist_port + 100 * i),
                zmq_port=config.get("zmq_port") or free_port(zmq_port and zmq_port + i),
                gpu_indices=list(gpus),
            )
        )
    return plans


def _devices(device_map: Any, replicas: int, ranks: int) -> list[list[int]]:
    """GPU indices of each replica's ranks, from any of the forms that MII accepts."""
    if device_map == "auto":
        return [list(range(i * ranks, (i + 1) * ranks)) for i in range(replicas)]
    if isinstance(device_map, int):
        device_map = [device_map]
    if isinstance(device_map, Mapping):
        if not set(device_map) <= _LOCAL_HOSTS:
            raise ConfigError("replicas run on this machine only", field="device_map")
        slots = [list(gpus) for host in device_map.values() for gpus in host]
    elif device_map and isinstance(device_map[0], int):
        slots = [list(device_map)]
    else:
        slots = [list(gpus) for gpus in device_map]
    if [len(gpus) for gpus in slots] != [ranks] * replicas:
        raise ConfigError(
            f"must name {ranks} devices for each of {replicas} replicas", field="device_map"
        )
    return slots
