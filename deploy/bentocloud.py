"""BentoCloud: the deployment configuration that `bentoml deploy -f` reads."""

from __future__ import annotations

from typing import Any

import bentoml

from deploy.plan import Plan
from runners.contracts.errors import ConfigError
from settings import variable

SERVICE = "triptych"
"""The name of the service in service.py."""


def deployment(plan: Plan) -> dict[str, Any]:
    """BentoML's deployment configuration. Raises: ConfigError if BentoCloud cannot run the plan."""
    plan.require_one_node("BentoCloud")
    if not plan.options.bento:
        raise ConfigError("BentoCloud runs bentos: name one with --bento")
    service: dict[str, Any] = {
        "scaling": {
            "min_replicas": plan.options.replicas,
            "max_replicas": plan.max_replicas,
        },
        "cold_start_timeout": plan.start_s,
    }
    if overrides := _overrides(plan):
        service["config_overrides"] = overrides
    if plan.options.instance_type:
        service["instance_type"] = plan.options.instance_type
    config: dict[str, Any] = {
        "name": plan.options.name,
        "bento": plan.options.bento,
        "access_authorization": True,
        "services": {SERVICE: service},
    }
    # BentoCloud chooses the port.
    if variables := {k: v for k, v in plan.environment().items() if k != variable("port")}:
        config["envs"] = [{"name": name, "value": value} for name, value in variables.items()]
    if secret := plan.options.api_key_secret:
        config["secrets"] = [secret]
    return config


def _overrides(plan: Plan) -> dict[str, Any]:
    """Resources and traffic under the settings made here, where they differ from the bento's."""
    [service] = bentoml.bentos.get(plan.options.bento).info.services
    wanted: dict[str, dict[str, float]] = {
        "resources": {"gpu": plan.gpus} if plan.gpus else {},
        "traffic": {"timeout": plan.settings.timer, "concurrency": plan.max_concurrency},
    }
    if service.config.get("resources") and not plan.gpus:
        raise ConfigError("the bento asks for GPUs, which a deployment cannot undo: build it again")
    built = service.config
    return {k: v for k, v in wanted.items() if not v.items() <= built.get(k, {}).items()}
