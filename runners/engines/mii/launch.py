"""`python -m runners.engines.mii.launch PLAN PARENT_PID ROLE ...`: one process of a deployment.

Its supervisor starts it. Roles: `replica N RANK` (rank 0 is MII's gRPC server and scheduler, the
other ranks follow it), `balancer`, `gateway`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from runners.contracts.errors import ConfigError
from runners.engines.mii.deployment.balancer import balance
from runners.engines.mii.deployment.plan import (
    FAILURE,
    FATAL,
    DeploymentPlan,
    ReplicaPlan,
    read_plan,
)
from runners.protocol.process import die_with_parent, ignore_signals


def main() -> None:
    """Run the role until the deployment ends."""
    path, parent, role, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    ignore_signals()
    try:
        _run(read_plan(Path(path)), role, *map(int, arguments))
    except ConfigError as error:
        Path(path).with_name(FAILURE).write_text(error.message)
        print(error.message, file=sys.stderr, flush=True)
        os._exit(FATAL)
    # An ordinary exit would wait for gRPC's threads.
    sys.stdout.flush()
    os._exit(0)


def _run(plan: DeploymentPlan, role: str, *arguments: int) -> None:
    if role == "replica":
        number, rank = arguments
        _replica(plan, plan.replicas[number], rank)
    elif role == "balancer":
        asyncio.run(balance(plan.port, [replica.port for replica in plan.replicas]))
    else:
        # FastAPI would delay the start of the other roles.
        from runners.engines.mii.deployment.gateway import serve_gateway

        asyncio.run(serve_gateway(plan))


def _replica(plan: DeploymentPlan, replica: ReplicaPlan, rank: int) -> None:
    # MII takes seconds and half a gigabyte, which only replicas need.
    import mii.api
    from mii.config import ModelConfig
    from mii.grpc_related import modelresponse_server

    from runners.engines.mii.patches import loading

    loading.settings.update(plan.settings)
    config: Any = ModelConfig(**plan.model_config)
    config.zmq_port_number = replica.zmq_port
    config.torch_dist_port = replica.torch_dist_port
    pipeline: Any = mii.api.async_pipeline(config)
    if rank == 0:
        modelresponse_server.serve_inference(pipeline, replica.port)
    else:
        pipeline()


if __name__ == "__main__":
    main()
