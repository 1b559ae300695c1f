"""BentoCloud: what `bentoml deploy -f` takes."""

from __future__ import annotations

from typing import Any

import bentoml

from deploy.plan import Plan
from runners.contracts.errors import ConfigError
from settings import variable

SERVICE = "triptych"
"""The name of the service in service.py."""


def deployment(plan: Plan) -> dict[str, Any]:
    """BentoML's deployment configuration. Raises: ConfigError for what can not be."""
    plan.refuse_several_machines("BentoCloud runs a replica")
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
    # Its port is BentoCloud's to say.
    if variables := {k: v for k, v in plan.environment().items() if k != variable("port")}:
        config["envs"] = [{"name": name, "value": value} for name, value in variables.items()]
    if secret := plan.options.api_key_secret:
        config["secrets"] = [secret]
    return config


def _overrides(plan: Plan) -> dict[str, Any]:
    """What the models ask for by what is set here, where the bento itself says otherwise."""
    [service] = bentoml.bentos.get(plan.options.bento).info.services
    asked: dict[str, dict[str, float]] = {
        "resources": {"gpu": plan.gpus} if plan.gpus else {},
        "traffic": {"timeout": plan.settings.timer, "concurrency": plan.places},
    }
    if service.config.get("resources") and not plan.gpus:
        raise ConfigError("the bento asks for GPUs, which can not be taken back: build it anew")
    return {k: v for k, v in asked.items() if not v.items() <= service.config.get(k, {}).items()}
