"""`mii.serve`: a detached, supervised deployment, on loopback, in place of MII's server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mii.backend.server import MIIServer
from mii.config import MIIConfig

from runners.engines.mii.deployment.plan import plan_deployment
from runners.engines.mii.deployment.ports import free_port
from runners.engines.mii.deployment.registry import (
    already_running,
    deployment_folder,
    private_cache,
    wait_until_stopped,
)
from runners.engines.mii.deployment.starting import start, wait_until_serving


class DetachedServer(MIIServer):  # type: ignore[misc]  # MII has no types
    """Starts a deployment that outlives this process, and returns once it serves."""

    def __init__(self, mii_config: MIIConfig) -> None:
        model = mii_config.model_conf
        plan = plan_deployment(
            mii_config,
            model,
            name=mii_config.deployment_name,
            ranks=model.tensor_parallel,
            model_config=model.model_dump(mode="json"),
        )
        folder = deployment_folder(plan.name)
        supervisor = start(plan, folder, detached=True)
        if supervisor is None:
            raise already_running(plan.name, folder)
        supervisor.wait()  # it has forked: this is the parent, which exits at once
        wait_until_serving(plan, folder)


def patched_parse_kwargs(original: Callable[..., MIIConfig]) -> Callable[..., MIIConfig]:
    """MII's parser of the arguments of `mii.serve`; ports that they leave out are free ones."""

    def parse_kwargs(
        model_name_or_path: str = "",
        model_config: Mapping[str, Any] | None = None,
        mii_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> MIIConfig:
        private_cache()
        config = original(
            model_name_or_path,
            # MII writes into both.
            None if model_config is None else dict(model_config),
            dict(mii_config or {}),
            **kwargs,
        )
        for name in ("port_number", "restful_api_port"):
            if name not in kwargs and name not in (mii_config or {}):
                setattr(config, name, free_port(getattr(config, name)))
        # MII overwrites the score file next, by which clients find a deployment that still runs.
        wait_until_stopped(config.deployment_name, deployment_folder(config.deployment_name))
        return config

    return parse_kwargs
