"""BentoCloud: what `bentoml deploy -f` takes."""

from __future__ import annotations

from typing import Any

from deploy.plan import Plan
from runners.errors import ConfigError

SERVICE = "triptych"
"""The name of the service in service.py."""


def deployment(plan: Plan) -> dict[str, Any]:
    """BentoML's deployment configuration. Raises: ConfigError for what can not be."""
    if plan.nnodes > 1:
        raise ConfigError(
            f"the model is spread over {plan.nnodes} machines, and BentoCloud runs a replica on "
            "one: set TRIPTYCH_NNODES=1, or choose kubernetes"
        )
    if not plan.options.bento:
        raise ConfigError("BentoCloud runs bentos: name one with --bento")
    places = sum(model.config.places for model in plan.models)
    overrides: dict[str, Any] = {"traffic": {"concurrency": places}}
    if plan.gpus:
        overrides["resources"] = {"gpu": plan.gpus}
    service: dict[str, Any] = {
        "scaling": {
            "min_replicas": plan.options.replicas,
            "max_replicas": plan.options.max_replicas,
        },
        "cold_start_timeout": plan.start_s,
        "config_overrides": overrides,
    }
    if plan.options.instance_type:
        service["instance_type"] = plan.options.instance_type
    config: dict[str, Any] = {
        "name": plan.options.name,
        "bento": plan.options.bento,
        "access_authorization": True,
        "services": {SERVICE: service},
    }
    if variables := plan.environment():
        config["envs"] = [{"name": name, "value": value} for name, value in variables.items()]
    if secret := plan.options.api_key_secret:
        config["secrets"] = [secret]
    return config
