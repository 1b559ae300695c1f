"""`python -m runners.engines.mii.deployment.supervisor PLAN PARENT_PID|--detached`.

The process that starts the processes of a deployment and keeps them running. A replica that loses
one rank, or one of whose ranks hangs, is killed whole and restarted; so are the balancer and the
gateway. When a client
terminates the deployment, all processes are killed and the plan is removed. The lock on the
deployment's folder, inherited from the parent (see `registry`), is released with this process. With
a parent the deployment ends when the parent does; a detached deployment outlives it.

MII's own launcher supervises nothing. circus restarts processes one by one and torch elastic one
group of ranks; neither notices one that hangs, or knows a replica that never listened from one that
served and died, which decides here whether a restart can help.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from runners.engines.mii.deployment.heartbeats import (
    BALANCER,
    Heartbeats,
    Watch,
    gateway_slot,
    replica_slots,
)
from runners.engines.mii.deployment.plan import (
    FATAL,
    DeploymentPlan,
    ReplicaPlan,
    Timeouts,
    read_plan,
)
from runners.engines.mii.deployment.ports import LOOPBACK, listens
from runners.protocol.environment import usable_cores
from runners.protocol.process import die_with_parent, ignore_signals

GATEWAY_EXIT_S = 5.0
MAX_PAUSE_S = 10.0
MAX_FAILURES = 5
QUICK_S = 30.0
"""A process group that ends sooner has failed to start, as has one that never listened."""
_POLL_S = 0.5


@dataclass(frozen=True)
class GroupEnd:
    """How a run of a process group ended."""

    reason: str
    served: bool
    """Whether the group ever listened."""
    status: int | None = None
    """Exit status of the process that ended first; None if the group was ended for `reason`."""


@dataclass
class ProcessGroup:
    """Processes that are started and killed together."""

    name: str
    port: int
    """Where it listens once it serves."""
    commands: list[tuple[list[str], dict[str, str]]]
    """Arguments and additional environment variables of each process."""
    first_slot: int
    """The slot of its first process in the heartbeats; those of the others follow."""
    timeouts: Timeouts
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def supervise(self, program: list[str], heartbeats: Heartbeats) -> bool:
        """Run the group, and restart it until it exits with status 0 or restarts cannot help.

        `program`: the start of each process's command line. Returns whether the status was 0.
        """
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            started = loop.time()
            end = await self.run(program, heartbeats)
            if end.status in (0, FATAL):
                return end.status == 0
            succeeded = end.served and loop.time() - started > QUICK_S
            failures = 1 if succeeded else failures + 1
            if failures > MAX_FAILURES:
                return False
            print(f"{self.name} {end.reason}: restarting it", flush=True)
            await asyncio.sleep(min(MAX_PAUSE_S, 2.0**failures - 1.5))

    async def run(self, program: list[str], heartbeats: Heartbeats) -> GroupEnd:
        """Start all processes, wait until the first ends or hangs, and kill the others."""
        waits: list[asyncio.Task[int]] = []
        slots = range(self.first_slot, self.first_slot + len(self.commands))
        try:
            for slot, (arguments, env) in zip(slots, self.commands, strict=True):
                heartbeats.write(slot, 0)
                process = await asyncio.create_subprocess_exec(
                    *program,
                    *arguments,
                    env=os.environ | env,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[heartbeats.descriptor],
                )
                self.processes.append(process)
                waits.append(asyncio.create_task(process.wait()))
            served, polls, watch = False, 0, Watch(heartbeats, slots)
            while True:
                served = served or listens(self.port)
                done, _ = await asyncio.wait(
                    waits, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED
                )
                if done:
                    status = next(iter(done)).result()
                    return GroupEnd(f"exited with status {status}", served, status)
                polls += 1
                watch.poll(_POLL_S)
                if not served and polls * _POLL_S > self.timeouts.start_timeout:
                    return GroupEnd("did not listen within start_timeout", served)
                if (reason := self._hangs(watch)) is not None:
                    return GroupEnd(reason, served)
        finally:
            await self.kill()

    def _hangs(self, watch: Watch) -> str | None:
        """Why one of the processes is taken for hung; None if none is."""
        if watch.silence() > (timeout := self.timeouts.heartbeat_timeout):
            return f"hangs: no heartbeat for {timeout:g} s"
        if watch.step_age() > (timeout := self.timeouts.step_timeout):
            return f"hangs: one step takes longer than {timeout:g} s"
        return None

    async def kill(self) -> None:
        """Kill all processes: none of a deployment has anything to save."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*(process.wait() for process in self.processes))
        self.processes.clear()


def process_groups(
    plan: DeploymentPlan,
) -> tuple[ProcessGroup, list[ProcessGroup], ProcessGroup | None]:
    """The balancer, the replicas, and the gateway if the plan has one."""
    ranks = sum(len(replica.gpu_indices) for replica in plan.replicas)
    threads = plan.settings.get("num_threads") or max(1, usable_cores() // ranks)
    replicas = [
        ProcessGroup(
            f"replica {i}",
            replica.port,
            [
                (
                    [str(slot), "replica", str(i), str(rank)],
                    rank_environment(replica, rank, threads),
                )
                for rank, slot in enumerate(slots)
            ],
            slots.start,
            plan.timeouts,
        )
        for i, (replica, slots) in enumerate(zip(plan.replicas, replica_slots(plan), strict=True))
    ]
    # The balancer waits for the replicas.
    timeouts = msgspec.structs.replace(plan.timeouts, start_timeout=math.inf)

    def single(role: str, port: int, slot: int) -> ProcessGroup:
        return ProcessGroup(role, port, [([str(slot), role], {})], slot, timeouts)

    balancer, gateway = single("balancer", plan.port, BALANCER), None
    if plan.rest_port is not None:
        gateway = single("gateway", plan.rest_port, gateway_slot(plan))
    return balancer, replicas, gateway


def rank_environment(replica: ReplicaPlan, rank: int, threads: int) -> dict[str, str]:
    """The variables that MII's launcher would set for a rank of a replica."""
    ranks = str(len(replica.gpu_indices))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "LOCAL_SIZE": ranks,
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(replica.torch_dist_port),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, replica.gpu_indices)),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


async def supervise(path: Path) -> None:
    """Run the deployment of a plan until a client terminates it or a replica cannot be run."""
    plan = read_plan(path)
    heartbeats = Heartbeats.create(gateway_slot(plan) + 1)
    program = [sys.executable, "-m", "runners.engines.mii.launch", str(path), str(os.getpid())]
    program.append(str(heartbeats.descriptor))
    balancer, replicas, gateway = process_groups(plan)

    def run(group: ProcessGroup) -> asyncio.Task[bool]:
        return asyncio.create_task(group.supervise(program, heartbeats))

    balancing, rest = run(balancer), [] if gateway is None else [run(gateway)]
    serving = [asyncio.create_task(_until_hopeless(run(replica))) for replica in replicas]
    try:
        await asyncio.wait({balancing, *serving}, return_when=asyncio.FIRST_COMPLETED)
        if rest and balancing.done():
            # MII's client then asks the gateway to end too, and fails if it is gone by then.
            await asyncio.wait(rest, timeout=GATEWAY_EXIT_S)
    finally:
        for task in (balancing, *serving, *rest):
            task.cancel()
        await asyncio.gather(balancing, *serving, *rest, return_exceptions=True)
        os.unlink(path)


async def _until_hopeless(supervising: asyncio.Task[bool]) -> None:
    """Returns once restarting a replica cannot help.

    A replica that a client has terminated directly is not restarted.
    """
    if await supervising:
        await asyncio.Event().wait()


async def _supervise_until_eof(path: Path) -> None:
    """Supervise a deployment until its parent closes the pipe to stdin, or dies."""
    loop = asyncio.get_running_loop()
    eof = asyncio.Event()

    def read() -> None:
        if not os.read(0, 4096):
            eof.set()
            loop.remove_reader(0)

    loop.add_reader(0, read)
    parent_gone = asyncio.create_task(eof.wait())
    supervising = asyncio.create_task(supervise(path))
    await asyncio.wait({supervising, parent_gone}, return_when=asyncio.FIRST_COMPLETED)
    supervising.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await supervising


async def _supervise_until_sigterm(path: Path) -> None:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - asyncio.run made it
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await supervise(path)


def main() -> None:
    """Supervise the deployment whose plan is the first argument."""
    path, parent = Path(sys.argv[1]), sys.argv[2]
    if parent == "--detached":
        # BentoML's supervisor ends all descendants of a server: the parent exits, so that this
        # process is none.
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_supervise_until_sigterm(path))
        return
    die_with_parent(int(parent))
    ignore_signals()
    asyncio.run(_supervise_until_eof(path))


if __name__ == "__main__":
    main()
