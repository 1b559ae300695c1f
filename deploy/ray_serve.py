"""Ray Serve: the config file that `serve deploy` takes, for `deploy.ray_app:app`."""

from __future__ import annotations

from typing import Any

from deploy.plan import DRAIN_MARGIN_S, Plan
from runners.contracts.errors import ConfigError
from settings import PREFIX, variable

APP, DEPLOYMENT = "deploy.ray_app:app", "Triptych"
"""Where Ray finds the application, and what its deployment is called there."""
TASK_RESULTS = "BENTOML_RESULT_STORE"
"""Which file has the results of tasks: the replicas' of one machine, or else each one's own."""


def serve_config(plan: Plan) -> dict[str, Any]:
    """Ray's `ServeDeploySchema`. Raises: ConfigError for what can not be."""
    plan.refuse_several_machines("Ray Serve runs a replica")
    if plan.options.bento:
        raise ConfigError("Ray Serve runs a checkout: choose models, not a bento")
    # How many requests wait, and what is refused, is for the service to say: max_ongoing_requests
    # stays that of `deploy.ray_app`. A lower one had Ray keep requests waiting, probes among them.
    deployment: dict[str, Any] = {
        "name": DEPLOYMENT,
        "health_check_timeout_s": DRAIN_MARGIN_S,
        "graceful_shutdown_timeout_s": plan.drain_s,
        "ray_actor_options": {"num_cpus": plan.cpus, "num_gpus": plan.gpus},
    }
    if plan.max_replicas > plan.options.replicas:
        deployment["autoscaling_config"] = {
            "min_replicas": plan.options.replicas,
            "max_replicas": plan.max_replicas,
            "target_ongoing_requests": plan.places,
            "downscale_delay_s": 300,
        }
    else:
        deployment["num_replicas"] = plan.options.replicas
    variables = plan.environment() | {variable(m.field): m.choice for m in plan.models}
    if (threads := plan.num_threads) is not None:
        variables[f"{PREFIX}NUM_THREADS"] = str(threads)
    if plan.spreads_tasks:
        # Ray asks any replica for a task's result, and rather not the one that is busy with it.
        results = f"/tmp/triptych-{plan.options.name}/tasks.db"  # noqa: S108 its folder is private
        variables[TASK_RESULTS] = results
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
