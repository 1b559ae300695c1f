"""`mii.serve`'s server: the same processes, but kept, on this machine's loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mii.backend.server import MIIServer
from mii.config import MIIConfig
from mii.score import generated_score_path

from runners.errors import ConfigError, EngineUnavailable
from runners.mii_deployment.places import free_port, listens, private_cache
from runners.mii_deployment.plan import PLAN, DeploymentPlan, ReplicaPlan
from runners.mii_deployment.starting import start, why_ended

POLL_S = 0.2
LOCAL = frozenset({"", "localhost", "127.0.0.1"})


class KeptServer(MIIServer):  # type: ignore[misc]  # MII carries no types
    """Stands a deployment up, and returns once it answers."""

    def __init__(self, mii_config: MIIConfig) -> None:
        folder = Path(generated_score_path(mii_config.deployment_name, "local")).parent
        plan = plan_deployment(mii_config)
        keeper = start(plan, folder, outlives=True)
        keeper.wait()  # it has left a process of its own
        ports = [plan.port, *(replica.port for replica in plan.replicas)]
        while not all(map(listens, ports)):
            if not (folder / PLAN).exists():
                raise EngineUnavailable(why_ended(plan.name, folder))
            time.sleep(POLL_S)


def parse(stock: Callable[..., MIIConfig]) -> Callable[..., MIIConfig]:
    """`mii.serve`'s reading of its arguments; ports it was not told are free ones."""

    def parse_kwargs(
        model_name_or_path: str = "",
        model_config: Mapping[str, Any] | None = None,
        mii_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> MIIConfig:
        private_cache()
        given = dict(mii_config or {})
        config = stock(
            model_name_or_path,
            None if model_config is None else dict(model_config),
            given,
            **kwargs,
        )
        for name in ("port_number", "restful_api_port"):
            if name not in kwargs and name not in (mii_config or {}):
                setattr(config, name, free_port(getattr(config, name)))
        return config

    return parse_kwargs


def plan_deployment(config: MIIConfig, settings: Mapping[str, Any] | None = None) -> DeploymentPlan:
    """The processes that MII's config asks for. Raises: ConfigError."""
    model: Any = config.model_conf
    given = model.replica_configs
    if any(replica.hostname not in LOCAL for replica in given):
        raise ConfigError("replica_configs: replicas run on this machine only")
    tp = model.tensor_parallel
    chosen = _device_map(model.device_map, model.replica_num, tp)
    replicas = []
    for i in range(model.replica_num):
        own = given[i] if given else None
        replicas.append(
            ReplicaPlan(
                port=own.tensor_parallel_ports[0]
                if own and own.tensor_parallel_ports
                else free_port(),
                torch_dist_port=(own and own.torch_dist_port)
                or free_port(model.torch_dist_port + 100 * i),
                zmq_port=(own and own.zmq_port) or free_port(model.zmq_port_number + i),
                gpu_indices=list(own.gpu_indices) if own and own.gpu_indices else chosen[i],
            )
        )
    return DeploymentPlan(
        name=config.deployment_name,
        port=config.port_number,
        model_config=model.model_dump(mode="json"),
        replicas=replicas,
        settings=dict(settings or {}),
        rest_host=config.restful_api_host,
        rest_port=config.restful_api_port if config.enable_restful_api else None,
        rest_limit=config.restful_processes,
    )


def _device_map(device_map: Any, replicas: int, tp: int) -> list[list[int]]:
    """GPU indices of each replica's ranks. Raises: ConfigError."""
    if device_map == "auto":
        return [list(range(i * tp, (i + 1) * tp)) for i in range(replicas)]
    if not set(device_map) <= LOCAL:
        raise ConfigError("device_map: replicas run on this machine only")
    slots = [list(each) for host in device_map.values() for each in host]
    if [len(each) for each in slots] != [tp] * replicas:
        raise ConfigError(f"device_map must name {tp} devices for each of {replicas} replicas")
    return slots
