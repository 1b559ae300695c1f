"""`mii.serve`'s server: the same processes, but kept, on this machine's loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mii.backend.server import MIIServer
from mii.config import MIIConfig
from mii.score import generated_score_path

from runners.errors import EngineUnavailable
from runners.mii_deployment.places import free_port, listens, private_cache
from runners.mii_deployment.plan import PLAN, DeploymentPlan, plan_replicas
from runners.mii_deployment.starting import start, why_ended

POLL_S = 0.2


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
    replicas = plan_replicas(
        [replica.model_dump() for replica in model.replica_configs],
        model.device_map,
        replicas=model.replica_num,
        ranks=model.tensor_parallel,
        torch_dist_port=model.torch_dist_port,
        zmq_port=model.zmq_port_number,
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
