"""`python -m runners.engines.mii.deployment.supervisor PLAN PARENT_PID|--detached`: keeps one up.

A replica that loses a process is ended whole and started again; so are the balancer and the
gateway. When a client terminates the deployment, all processes are ended and the plan is removed;
the lock on its folder (see `starting`), which was inherited, is held until then.
With a parent, the deployment goes with it; without, it outlives everybody. MII's own launcher
watches nothing of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from runners.engines.mii.deployment.places import listens
from runners.engines.mii.deployment.plan import FATAL, DeploymentPlan, environment, read_plan
from runners.protocol.environment import usable_cores
from runners.protocol.process import die_with_parent, ignore_signals

GATEWAY_EXIT_S = 5.0
MAX_PAUSE_S = 10.0
MAX_FAILURES = 5
QUICK_S = 30.0
"""A part that ends sooner has failed to start, as has one that never listened."""
POLL_S = 0.5


@dataclass
class Part:
    """Processes that live and die together."""

    name: str
    port: int
    """Where it listens once it serves."""
    commands: list[tuple[list[str], dict[str, str]]]
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def live(self, head: list[str]) -> tuple[int, bool]:
        """Start all, wait for the first to end, end the others; its status, and whether it ever
        served."""
        waits: list[asyncio.Task[int]] = []
        try:
            for arguments, env in self.commands:
                process = await asyncio.create_subprocess_exec(
                    *head, *arguments, env=os.environ | env, stdin=asyncio.subprocess.DEVNULL
                )
                self.processes.append(process)
                waits.append(asyncio.create_task(process.wait()))
            served, done = False, set[asyncio.Task[int]]()
            while not done:
                served = served or listens(self.port)
                done, _ = await asyncio.wait(
                    waits,
                    timeout=None if served else POLL_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            return next(iter(done)).result(), served
        finally:
            await self.end()

    async def end(self) -> None:
        """End all of it: nothing of a deployment has anything to save."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*(process.wait() for process in self.processes))
        self.processes.clear()

    async def keep(self, head: list[str]) -> bool:
        """Start it again whenever it ends, until it ends by itself with status 0: True. False if
        that can not help."""
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            began = loop.time()
            status, served = await self.live(head)
            if status in (0, FATAL):
                return status == 0
            lasted = served and loop.time() - began > QUICK_S
            failures = 1 if lasted else failures + 1
            if failures > MAX_FAILURES:
                return False
            print(f"{self.name} ended with status {status}: starting it again", flush=True)
            await asyncio.sleep(min(MAX_PAUSE_S, 2.0**failures - 1.5))


def parts(plan: DeploymentPlan) -> tuple[Part, list[Part], Part | None]:
    """The balancer, the replicas, and the gateway if there is one."""
    ranks = sum(len(replica.gpu_indices) for replica in plan.replicas)
    threads = plan.settings.get("num_threads") or max(1, usable_cores() // ranks)
    replicas = [
        Part(
            f"replica {i}",
            replica.port,
            [
                (["replica", str(i), str(rank)], environment(replica, rank, threads))
                for rank in range(len(replica.gpu_indices))
            ],
        )
        for i, replica in enumerate(plan.replicas)
    ]
    rest = plan.rest_port
    gateway = Part("gateway", rest, [(["gateway"], {})]) if rest is not None else None
    return Part("balancer", plan.port, [(["balancer"], {})]), replicas, gateway


async def keep(path: Path) -> None:
    """Until a client terminates the deployment."""
    plan = read_plan(path)
    head = [sys.executable, "-m", "runners.engines.mii.launch", str(path), str(os.getpid())]
    balancer, replicas, gateway = parts(plan)
    at_door = asyncio.create_task(balancer.keep(head))
    models = [asyncio.create_task(_lasting(replica, head)) for replica in replicas]
    rest = [asyncio.create_task(gateway.keep(head))] if gateway is not None else []
    try:
        await asyncio.wait({at_door, *models}, return_when=asyncio.FIRST_COMPLETED)
        if rest and at_door.done():
            # MII's client asks it to end too, and minds if it is gone already.
            await asyncio.wait(rest, timeout=GATEWAY_EXIT_S)
    finally:
        for task in (at_door, *models, *rest):
            task.cancel()
        await asyncio.gather(at_door, *models, *rest, return_exceptions=True)
        os.unlink(path)


async def _lasting(replica: Part, head: list[str]) -> None:
    """Keep a replica; returns if it can not be kept. One that a client ended directly stays so."""
    if await replica.keep(head):
        await asyncio.Event().wait()


async def _until_eof(path: Path) -> None:
    """Keep it until its parent closes our stdin, too."""
    loop = asyncio.get_running_loop()
    eof = asyncio.Event()

    def read() -> None:
        if not os.read(0, 4096):
            eof.set()
            loop.remove_reader(0)

    loop.add_reader(0, read)
    gone = asyncio.create_task(eof.wait())
    keeping = asyncio.create_task(keep(path))
    await asyncio.wait({keeping, gone}, return_when=asyncio.FIRST_COMPLETED)
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping


def main() -> None:
    """See the module."""
    path, parent = Path(sys.argv[1]), sys.argv[2]
    if parent == "--detached":
        # A server's supervisor ends its descendants with it: this must not be one.
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_until_terminated(path))
        return
    die_with_parent(int(parent))
    ignore_signals()
    asyncio.run(_until_eof(path))


async def _until_terminated(path: Path) -> None:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - asyncio.run made it
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await keep(path)


if __name__ == "__main__":
    main()
