"""Ray Serve: the config file that `serve deploy` takes, for `deploy.ray_app:app`."""

from __future__ import annotations

from typing import Any

from deploy.plan import DRAIN_MARGIN_S, Plan
from runners.errors import ConfigError
from settings import PREFIX, variable

APP, DEPLOYMENT = "deploy.ray_app:app", "Triptych"
"""Where Ray finds the application, and what its deployment is called there."""


def serve_config(plan: Plan) -> dict[str, Any]:
    """Ray's `ServeDeploySchema`. Raises: ConfigError for what can not be."""
    if plan.nnodes > 1:
        raise ConfigError(
            f"the model is spread over {plan.nnodes} machines, and a replica of Ray Serve is on "
            "one: set TRIPTYCH_NNODES=1, or choose kubernetes"
        )
    if plan.options.bento:
        raise ConfigError("Ray Serve runs a checkout: choose models, not a bento")
    # The models' own batches, and as many again that wait: Ray starts a replica before one is full.
    places = sum(model.config.places for model in plan.models)
    deployment: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": plan.settings.max_queue,
        "health_check_timeout_s": DRAIN_MARGIN_S,
        "graceful_shutdown_timeout_s": plan.drain_s,
        "ray_actor_options": {"num_cpus": plan.cpus, "num_gpus": plan.gpus},
    }
    if plan.options.max_replicas > plan.options.replicas:
        deployment["autoscaling_config"] = {
            "min_replicas": plan.options.replicas,
            "max_replicas": plan.options.max_replicas,
            "target_ongoing_requests": places,
            "downscale_delay_s": 300,
        }
    else:
        deployment["num_replicas"] = plan.options.replicas
    variables = plan.environment() | {variable(m.field): m.choice for m in plan.models}
    if not plan.gpus:
        variables.setdefault(f"{PREFIX}NUM_THREADS", str(max(1, (plan.cpus - 1) // plan.ranks)))
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": plan.settings.port},  # noqa: S104 a cluster's door
        "applications": [
            {
                "name": plan.options.name,
                "import_path": APP,
                "route_prefix": "/",
                "runtime_env": {"env_vars": dict(sorted(variables.items()))},
                "deployments": [deployment],
            }
        ],
    }
