"""`mii.serve`'s server: the same processes, but kept, on this machine's loopback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mii.backend.server import MIIServer
from mii.config import MIIConfig

from runners.engines.mii.deployment.places import deployment_folder, free_port, private_cache
from runners.engines.mii.deployment.plan import DeploymentPlan, plan_replicas
from runners.engines.mii.deployment.starting import (
    runs_already,
    start,
    wait_until_gone,
    wait_until_serving,
)


class KeptServer(MIIServer):  # type: ignore[misc]  # MII carries no types
    """Stands a deployment up, and returns once it answers."""

    def __init__(self, mii_config: MIIConfig) -> None:
        folder = deployment_folder(mii_config.deployment_name)
        plan = plan_deployment(mii_config)
        keeper = start(plan, folder, outlives=True)
        if keeper is None:
            raise runs_already(plan.name, folder)
        keeper.wait()  # it has left a process of its own
        wait_until_serving(plan, folder)


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
        # Before MII overwrites what the other's clients find it by.
        wait_until_gone(config.deployment_name, deployment_folder(config.deployment_name))
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
