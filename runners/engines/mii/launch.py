"""`python -m runners.engines.mii.launch PLAN PARENT_PID HEARTBEATS SLOT ROLE ...`.

One process of a deployment, started by its supervisor. HEARTBEATS is a file descriptor (see
`deployment.heartbeats`), SLOT the slot of this process. Roles: `replica N RANK` (rank 0 is MII's
gRPC server and scheduler, the other ranks follow it), `balancer`, `gateway`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from runners.contracts.errors import ConfigError
from runners.engines.mii.deployment.balancer import balance
from runners.engines.mii.deployment.heartbeats import Heartbeats, Watch, replica_slots
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
    path, parent, descriptor, slot, role, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    ignore_signals()
    heartbeats = Heartbeats(int(descriptor))
    try:
        _run(read_plan(Path(path)), heartbeats, int(slot), role, *map(int, arguments))
    except ConfigError as error:
        Path(path).with_name(FAILURE).write_text(error.message)
        print(error.message, file=sys.stderr, flush=True)
        os._exit(FATAL)
    # An ordinary exit would wait for gRPC's threads.
    sys.stdout.flush()
    os._exit(0)


def _run(
    plan: DeploymentPlan, heartbeats: Heartbeats, slot: int, role: str, *arguments: int
) -> None:
    if role == "replica":
        number, rank = arguments
        pipeline = _load(plan, plan.replicas[number])
        heartbeats.start(slot, lambda: pipeline.step_clock.age)
        _serve(pipeline, plan.replicas[number], rank)
        return
    if role == "balancer":
        ports = [replica.port for replica in plan.replicas]
        slots = replica_slots(plan)
        watch = Watch(heartbeats, itertools.chain(*slots))
        work = balance(plan.port, ports, watch, slots)
    else:
        # FastAPI would delay the start of the other roles.
        from runners.engines.mii.deployment.gateway import serve_gateway

        work = serve_gateway(plan)
    asyncio.run(_with_heartbeats(work, heartbeats, slot))


async def _with_heartbeats(
    work: Coroutine[Any, Any, None], heartbeats: Heartbeats, slot: int
) -> None:
    sending = asyncio.create_task(heartbeats.send_from_loop(slot))
    try:
        await work
    finally:
        sending.cancel()


def _load(plan: DeploymentPlan, replica: ReplicaPlan) -> Any:
    """MII's pipeline of a replica's rank."""
    # MII takes seconds and half a gigabyte, which only replicas need.
    import mii.api
    from mii.config import ModelConfig

    from runners.engines.mii.patches import loading

    loading.settings.update(plan.settings)
    config: Any = ModelConfig(**plan.model_config)
    config.zmq_port_number = replica.zmq_port
    config.torch_dist_port = replica.torch_dist_port
    return mii.api.async_pipeline(config)


def _serve(pipeline: Any, replica: ReplicaPlan, rank: int) -> None:
    from mii.grpc_related import modelresponse_server

    if rank == 0:
        modelresponse_server.serve_inference(pipeline, replica.port)
    else:
        pipeline()


if __name__ == "__main__":
    main()
