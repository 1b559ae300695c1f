"""Ray Serve: the config file that `serve deploy` reads, for `deploy.ray_app:app`."""

from __future__ import annotations

from typing import Any

from deploy.plan import DRAIN_MARGIN_S, Plan
from runners.contracts.errors import ConfigError
from settings import PREFIX, variable

APP, DEPLOYMENT = "deploy.ray_app:app", "Triptych"
"""The import path of the application, and the name of its deployment in it."""
TASK_RESULTS = "BENTOML_RESULT_STORE"
"""BentoML's variable for the file with the results of async tasks (jobs). Without it each replica
has a file that no other replica reads."""


def serve_config(plan: Plan) -> dict[str, Any]:
    """Ray's `ServeDeploySchema`. Raises: ConfigError if Ray Serve cannot run the plan."""
    plan.require_one_node("Ray Serve")
    if plan.options.bento:
        raise ConfigError("Ray Serve runs a checkout: choose models, not a bento")
    # The service queues and refuses requests itself, so max_ongoing_requests stays that of
    # `deploy.ray_app`: with a lower one Ray queues requests, health probes included.
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
            "target_ongoing_requests": plan.max_concurrency,
            "downscale_delay_s": 300,
        }
    else:
        deployment["num_replicas"] = plan.options.replicas
    variables = plan.environment() | {variable(m.field): m.choice for m in plan.models}
    if (threads := plan.num_threads) is not None:
        variables[f"{PREFIX}NUM_THREADS"] = str(threads)
    if plan.splits_jobs:
        # Ray may ask any replica for the result of a job, so those of a machine share one file.
        variables[TASK_RESULTS] = f"/tmp/triptych-{plan.options.name}/tasks.db"  # noqa: S108 - 0700
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": plan.settings.port},  # noqa: S104 - a cluster serves others
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
