"""Deployments with one name, on one port, or without their supervisor: refusals and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from runners import create_runner
from runners.config.files import load_setup_config
from runners.contracts.errors import ConfigError, RunnerUnavailable
from runners.contracts.runner import RunnerState
from runners.contracts.text import TextRunner
from runners.engines.mii.deployment import balancer, client, registry, supervisor
from runners.engines.mii.deployment.balancer import balance
from runners.engines.mii.deployment.heartbeats import Heartbeats, Watch
from runners.engines.mii.deployment.plan import (
    PLAN,
    DeploymentPlan,
    ReplicaPlan,
    Timeouts,
    read_plan,
)
from runners.engines.mii.deployment.ports import free_port
from runners.engines.mii.deployment.starting import start, wait_until_serving
from tests.mii.conftest import PATCHES, Scripts
from tests.support.generating import collect, ids_of, request, serving, wait_ready
from tests.support.models import greedy, write_model
from tests.support.processes import alive, mii_processes, stop, wait_until

pytestmark = pytest.mark.usefixtures("forked_ranks")
KEPT = {"mode": "persistent", "keep_alive": True, "deployment_name": "kept"}

ATTEMPTS = (
    PATCHES
    + """
import mii
for arguments in {attempts}:
    try:
        mii.serve("{folder}", **arguments)
    except Exception as error:
        print("REFUSED", error)
"""
)


@pytest.fixture(autouse=True)
def kill_leftovers(cache: Path) -> Iterator[None]:
    """What a failing test leaves behind must not disturb the next test."""
    yield
    for process in mii_processes(cache):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


async def failure(folder: Path, section: dict[str, Any]) -> str:
    """Why a runner cannot be started."""
    config, _ = load_setup_config(
        folder, name="m", overrides={"num_threads": 1, "engine": "mii", "mii": section}
    )
    runner: TextRunner = create_runner(config)
    await runner.start()
    try:
        async with asyncio.timeout(90):
            while runner.health().state is not RunnerState.FAILED:
                assert not runner.health().ready
                await asyncio.sleep(0.05)
        return runner.health().detail
    finally:
        await runner.stop()


def role_processes(cache: Path, role: str) -> list[psutil.Process]:
    return [p for p in mii_processes(cache) if role in p.cmdline()]


def end(name: str, cache: Path, scripts: Scripts) -> None:
    scripts.run(f'import mii\nmii.client("{name}").terminate_server()')
    wait_until(lambda: not mii_processes(cache), 10, "all of the deployment is gone")


async def lose(
    runner: TextRunner, lost: psutil.Process, fault: Callable[[psutil.Process], None], *, told: str
) -> None:
    """Lose a process of the deployment with a request in flight, which is told."""
    stream = await runner.submit(request("hello", max_new_tokens=500, ignore_eos=True))
    await anext(aiter(stream))
    fault(lost)
    with pytest.raises(RunnerUnavailable, match=told):
        async with asyncio.timeout(15):
            async for _ in stream:
                pass
    wait_until(lambda: alive([lost]) == [], 10, "it is gone")


async def answered(runner: TextRunner) -> list[list[int]]:
    """The tokens of a request, as soon as one is served."""
    async with asyncio.timeout(120):
        while True:
            await wait_ready(runner)
            with contextlib.suppress(RunnerUnavailable):
                answer = await collect(runner, "hello", max_new_tokens=8, ignore_eos=True)
                return [ids_of(answer)]


async def test_only_the_same_deployment_is_reused(
    tmp_path: Path, cache: Path, scripts: Scripts
) -> None:
    """And the runner is ready only while one of its replicas is up and does not hang."""
    folder = write_model("llama", tmp_path / "v1")
    other = write_model("mistral", tmp_path / "v2")
    want = greedy(folder, ["hello"], 8)
    async with serving(folder, engine="mii", mii=KEPT, heartbeat_timeout=3) as runner:
        assert "another model_name_or_path, weights: terminate it" in await failure(other, KEPT)
        assert "another replica_num:" in await failure(folder, KEPT | {"replica_num": 2})
        assert "another port_number:" in await failure(folder, KEPT | {"port_number": free_port()})
        for fault in (psutil.Process.kill, stop):
            [replica] = role_processes(cache, "replica")
            await lose(runner, replica, fault, told="replica 0 went down")
            async with asyncio.timeout(20):
                while runner.health().ready:
                    await asyncio.sleep(0.05)
            assert await answered(runner) == want
        [forwarding] = role_processes(cache, "balancer")
        await lose(runner, forwarding, stop, told="the MII deployment")
        assert await answered(runner) == want
    os.utime(folder / "model.safetensors", (1, 1))
    assert "runs with another weights:" in await failure(folder, KEPT)
    end("kept", cache, scripts)


def test_a_name_and_a_port_belong_to_one_deployment(
    tmp_path: Path, cache: Path, scripts: Scripts
) -> None:
    folder = write_model("llama", tmp_path / "m")
    # MII's default port is for the tests of its published code, which may run beside this one.
    own = f'deployment_name="one", port_number={free_port()}'
    scripts.run(f'{PATCHES}import mii\nmii.serve("{folder}", {own})')
    before = {p.pid for p in mii_processes(cache)}
    score = (cache / "one" / "score.py").read_text()
    port = read_plan(cache / "one" / PLAN).port
    attempts = {
        "deployment one is already running": {"deployment_name": "one"},
        f"port {port} is taken": {"deployment_name": "2", "port_number": port},
        "is a path to another folder": {"deployment_name": "../../x"},
    }
    printed = scripts.run(ATTEMPTS.format(folder=str(folder), attempts=list(attempts.values())))
    refusals = re.findall(r"REFUSED (.*)", printed)
    for sentence, refusal in zip(attempts, refusals, strict=True):
        assert sentence in refusal
    assert (cache / "one" / "score.py").read_text() == score
    assert {p.pid for p in mii_processes(cache)} == before
    end("one", cache, scripts)


async def test_a_start_ends_with_its_supervisor(tmp_path: Path, cache: Path) -> None:
    """What it leaves behind, a plan and a foreign program on its port, does no harm."""
    folder = write_model("llama", tmp_path / "m")
    plan = plan_of(folder)
    process = start(plan, cache / "kept", detached=True)
    assert process is not None
    process.wait()
    assert start(plan, cache / "kept", detached=True) is None
    module = "runners.engines.mii.deployment.supervisor"
    os.kill(role_processes(cache, module)[0].pid, signal.SIGKILL)
    with pytest.raises(ConfigError, match="ended while it was starting"):
        wait_until_serving(plan, cache / "kept")
    wait_until(lambda: not mii_processes(cache), 10, "all of the deployment is gone")
    assert (cache / "kept" / PLAN).exists()
    with socket.create_server(("127.0.0.1", plan.port)):
        section = KEPT | {"keep_alive": False}
        async with serving(folder, engine="mii", mii=section) as runner:
            assert runner.health().ready


def test_plans_of_killed_supervisors_are_removed(tmp_path: Path, cache: Path) -> None:
    names = ("killed", "nested/killed", "running")
    files = [plan_of(tmp_path).write(registry.deployment_folder(name)) for name in names]
    running = registry.lock(files[-1].parent)
    assert running is not None
    registry.remove_plans_of_killed()
    assert [file.exists() for file in files] == [False, False, True]
    os.close(running)


def plan_of(folder: Path) -> DeploymentPlan:
    ports = [free_port() for _ in range(4)]
    replica = ReplicaPlan(
        port=ports[1], torch_dist_port=ports[2], zmq_port=ports[3], gpu_indices=[0]
    )
    model = {"model_name_or_path": str(folder), "tensor_parallel": 1}
    return DeploymentPlan(name="kept", port=ports[0], model_config=model, replicas=[replica])


@pytest.mark.parametrize("serves", [True, False])
async def test_a_group_that_never_listens_is_not_restarted_for_ever(
    serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is longer than QUICK_S; only one that served resets the count of failures."""
    monkeypatch.setattr(supervisor, "QUICK_S", 0.0)
    monkeypatch.setattr(supervisor, "MAX_PAUSE_S", 0.0)
    monkeypatch.setattr(supervisor, "listens", lambda _: serves)
    command = ["-c", "import time; time.sleep(0.3); exit(1)"]
    group = supervisor.ProcessGroup("replica 0", 1, [(command, {})], 0, Timeouts())
    supervising = asyncio.create_task(group.supervise([sys.executable], Heartbeats.create(1)))
    try:
        done, _ = await asyncio.wait({supervising}, timeout=8)
        assert bool(done) is not serves
        assert serves or supervising.result() is False
    finally:
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)


BEATING = """
import os, signal, sys, time
from runners.engines.mii.deployment.heartbeats import Heartbeats
Heartbeats(int(sys.argv[1])).start(0, lambda: {step_age})
time.sleep({lives})
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.parametrize(
    ("timeouts", "process", "reason"),
    [
        (Timeouts(heartbeat_timeout=1), {"lives": 1, "step_age": 0}, "no heartbeat for 1 s"),
        (Timeouts(step_timeout=5), {"lives": 60, "step_age": 6}, "one step takes longer than 5 s"),
        (Timeouts(start_timeout=0.1), {"lives": 60, "step_age": 0}, "did not listen"),
    ],
)
async def test_a_process_that_hangs_is_killed(
    timeouts: Timeouts, process: dict[str, int], reason: str
) -> None:
    heartbeats = Heartbeats.create(1)
    command = ["-c", BEATING.format(**process), str(heartbeats.descriptor)]
    group = supervisor.ProcessGroup("replica 0", 1, [(command, {})], 0, timeouts)
    async with asyncio.timeout(30):
        end = await group.run([sys.executable], heartbeats)
    assert reason in end.reason
    assert (end.status, group.processes) == (None, [])


async def test_a_silent_replica_gets_no_request_while_another_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(balancer, "HEARTBEAT_S", 0.05)
    heartbeats, port, ports = Heartbeats.create(2), free_port(), [free_port(), free_port()]
    counts = [1, 1]

    async def beat() -> None:
        while True:
            await asyncio.sleep(0.02)
            for slot, count in enumerate(counts):
                heartbeats.write(slot, count)
            counts[1] += 1

    def answer(number: int) -> grpc.GenericRpcHandler:
        async def reply(_: bytes, __: object) -> bytes:
            return bytes([number])

        method = grpc.unary_unary_rpc_method_handler(reply)
        service, name = balancer.UNARY.strip("/").split("/")
        return grpc.method_handlers_generic_handler(service, {name: method})

    async with contextlib.AsyncExitStack() as stack:
        for number, replica_port in enumerate(ports):
            replica = grpc.aio.server()
            replica.add_generic_rpc_handlers((answer(number),))
            replica.add_insecure_port(f"127.0.0.1:{replica_port}")
            await replica.start()
            stack.push_async_callback(replica.stop, 0)
        watch = Watch(heartbeats, (0, 1))
        tasks = [
            asyncio.create_task(balance(port, ports, watch, [range(1), range(1, 2)])),
            asyncio.create_task(beat()),
        ]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        await asyncio.wait_for(channel.channel_ready(), 20)

        async def answered_by() -> set[int]:
            return {(await channel.unary_unary(balancer.UNARY)(b""))[0] for _ in range(4)}

        assert await answered_by() == {0, 1}
        monkeypatch.setattr(balancer, "SILENT_S", 0.2)
        async with asyncio.timeout(20):
            while await answered_by() != {1}:
                await asyncio.sleep(0.05)
        tasks[1].cancel()  # now both are silent
        async with asyncio.timeout(20):
            while await answered_by() != {0, 1}:
                await asyncio.sleep(0.05)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_two_balancers_do_not_share_a_port() -> None:
    port = free_port()
    first = asyncio.create_task(balance(port, []))
    await asyncio.sleep(0.5)
    with pytest.raises(ConfigError, match=f"port {port} is taken"):
        await asyncio.wait_for(balance(port, []), 5)
    assert not first.done()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_requests_wait_until_all_replicas_are_connected() -> None:
    """The first ones would all go to the replica that came up first."""
    port, early, late = free_port(), free_port(), free_port()
    balancing = asyncio.create_task(balance(port, [early, late]))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        ready = asyncio.create_task(channel.channel_ready())
        replicas = []
        for replica_port in (early, late):
            done, _ = await asyncio.wait({ready}, timeout=1.5)
            assert not done
            replicas.append(grpc.aio.server())
            replicas[-1].add_insecure_port(f"127.0.0.1:{replica_port}")
            await replicas[-1].start()
        await asyncio.wait_for(ready, 20)
    balancing.cancel()
    await asyncio.gather(balancing, *(r.stop(0) for r in replicas), return_exceptions=True)


async def test_a_link_is_lost_once_it_stays_away() -> None:
    port = free_port()
    serving = asyncio.create_task(balance(port, []))
    deployment = await client.connect("127.0.0.1", port)
    lost = asyncio.create_task(deployment.wait_until_lost(2.0))
    await asyncio.sleep(0.1)
    for comes_back in (True, False):
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        if comes_back:
            serving = asyncio.create_task(balance(port, []))
            await asyncio.sleep(3)
        done, _ = await asyncio.wait({lost}, timeout=0 if comes_back else 10)
        assert bool(done) is not comes_back
    await deployment.close()


async def test_a_foreign_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CONNECT_S", 0.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as foreign,
        pytest.raises(ConfigError, match="is not a deployment of MII"),
    ):
        await client.connect("127.0.0.1", foreign.getsockname()[1])
