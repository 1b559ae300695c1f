"""A model over several machines: here nodes on one machine, with a network of their own in one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from runners import create_runner
from runners.config.files import load_setup_config
from runners.contracts.errors import RunnerUnavailable
from tests.support.forked_ranks import forking
from tests.support.generating import collect, ids_of, request, serving, wait_ready
from tests.support.models import greedy, write_model
from tests.support.processes import alive, descendants, own_ranks, ranks_below, wait_until
from tests.support.server import ROOT

pytest.importorskip("deepspeed")

COUNT = 12
HEARTBEAT_S = 5
"""Busy machines miss shorter ones."""
OUTER, INNER = "10.231.7.1", "10.231.7.2"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """A machine that joins, as a process with a log."""

    def __init__(self, log: Path, command: list[str]) -> None:
        self._log = log
        env = os.environ | {"TRIPTYCH_NUM_THREADS": "1", "BENTOML_DO_NOT_TRACK": "True"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def rank(self) -> psutil.Process:
        return ranks_below(self.process.pid)[0]

    def stop(self) -> int:
        """Ends as an operator ends it; nothing of it may be left."""
        family = descendants(self.process.pid)
        self.process.terminate()
        code = self.process.wait(60)
        wait_until(lambda: not alive(family), 5, "all processes of the node are gone")
        return code


@contextmanager
def joining(log: Path, *arguments: object, inside: str | None = None) -> Iterator[Node]:
    prefix = ["ip", "netns", "exec", inside] if inside else []
    command = [sys.executable, "-m", "cli.join", *map(str, arguments)]
    node = Node(log, prefix + command)
    try:
        yield node
    finally:
        with suppress(psutil.NoSuchProcess):
            node.stop()


def options(endpoint: str) -> dict[str, Any]:
    return {
        "engine": "deepspeed",
        "tensor_parallel": 2,
        "nnodes": 2,
        "rdzv_endpoint": endpoint,
        "heartbeat_timeout": HEARTBEAT_S,
        "start_timeout": 60,
    }


def as_arguments(folder: Path, endpoint: str) -> list[object]:
    return [
        *(folder, "--nnodes", 2, "--node-rank", 1, "--tensor-parallel", 2),
        *("--rdzv-endpoint", endpoint),
    ]


async def never_ready(folder: Path, **overrides: Any) -> None:
    async with serving(folder, **overrides):
        raise AssertionError("node 0 serves without the other")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_model("llama", tmp_path / "llama")
    setup = {"engine": "deepspeed", "heartbeat_timeout": HEARTBEAT_S}
    (folder / "setup_config.json").write_text(json.dumps(setup))
    return folder


@pytest.fixture
def forked() -> Iterator[None]:
    """Node 0's ranks are forks; those of the other node, which are killed, are not."""
    with forking():
        yield


@pytest.mark.usefixtures("forked")
async def test_two_nodes_serve_one_model_and_survive_the_loss_of_a_rank(
    folder: Path, tmp_path: Path
) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with joining(tmp_path / "node1.log", *as_arguments(folder, endpoint)) as node:
        async with serving(folder, **options(endpoint)) as runner:
            deltas = await collect(runner, "hello", max_new_tokens=COUNT, ignore_eos=True)
            assert [ids_of(deltas)] == greedy(folder, ["hello"], COUNT)
            assert node.rank().environ()["RANK"] == "1"
            for fault, limit in ((signal.SIGKILL, 2), (signal.SIGSTOP, 6)):
                stream = await runner.submit(request("hello", max_new_tokens=500, ignore_eos=True))
                iterator = aiter(stream)
                await anext(iterator)
                lost_at = time.monotonic()
                node.rank().send_signal(fault)
                with pytest.raises(RunnerUnavailable, match="with the request in flight") as info:
                    while True:
                        await anext(iterator)
                assert time.monotonic() - lost_at < limit
                # Whichever host is first: node 1's ends its stopped rank itself.
                assert re.search(
                    "rank 0 lost the connection to another rank|rank 1 .* hangs", str(info.value)
                )
                await wait_ready(runner)
                deltas = await collect(runner, "hello", max_new_tokens=COUNT, ignore_eos=True)
                assert [ids_of(deltas)] == greedy(folder, ["hello"], COUNT)
        assert node.stop() == 0


@pytest.mark.usefixtures("forked")
async def test_a_node_that_is_ended_serves_the_requests_that_run(
    folder: Path, tmp_path: Path
) -> None:
    """`--drain`: a cluster ends all machines of a model at once."""
    endpoint = f"127.0.0.1:{free_port()}"
    arguments = [*as_arguments(folder, endpoint), "--drain", 120]
    with joining(tmp_path / "node1.log", *arguments) as node:
        async with serving(folder, **options(endpoint)) as runner:
            stream = await runner.submit(request("hello", max_new_tokens=500, ignore_eos=True))
            iterator = aiter(stream)
            first = await anext(iterator)
            node.process.terminate()
            rest = [delta async for delta in iterator]
            assert [ids_of([first, *rest])] == greedy(folder, ["hello"], 500)
        assert node.process.wait(60) == 0


@pytest.mark.usefixtures("forked")
async def test_a_node_that_is_lost_during_the_start_is_waited_for(
    folder: Path, tmp_path: Path
) -> None:
    """Which no fault of the model is."""
    endpoint = f"127.0.0.1:{free_port()}"
    config, _ = load_setup_config(folder, name="llama", overrides=options(endpoint))
    runner = create_runner(config)
    with joining(tmp_path / "node1.log", *as_arguments(folder, endpoint)) as node:
        await runner.start()
        try:
            async with asyncio.timeout(60):
                while "comparing batched steps" not in runner.health().detail:
                    await asyncio.sleep(0.005)
            node.rank().kill()
            await wait_ready(runner)
            assert runner.health().restarts
            deltas = await collect(runner, "hello", max_new_tokens=COUNT, ignore_eos=True)
            assert [ids_of(deltas)] == greedy(folder, ["hello"], COUNT)
        finally:
            await runner.stop()


async def test_nodes_need_not_all_have_a_compiler(folder: Path, tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with joining(tmp_path / "node1.log", *as_arguments(folder, endpoint)):
        async with serving(folder, **options(endpoint), cpu_kernels=False) as runner:
            deltas = await collect(runner, "hello", max_new_tokens=COUNT, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, ["hello"], COUNT)


@pytest.mark.usefixtures("forked")
async def test_torchrun_may_hold_the_ranks_of_a_node(folder: Path, tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
    join = ["-m", "cli.join", *map(str, as_arguments(folder, endpoint))]
    node = Node(
        tmp_path / "node1.log", [*torchrun, "--nproc-per-node=1", "--max-restarts=9", *join]
    )
    try:
        async with serving(folder, **options(endpoint)) as runner:
            deltas = await collect(runner, "hello", max_new_tokens=COUNT, ignore_eos=True)
            assert [ids_of(deltas)] == greedy(folder, ["hello"], COUNT)
            own_ranks()[0].kill()
            while runner.health().ready:
                await asyncio.sleep(0.05)
            await wait_ready(runner)
            deltas = await collect(runner, "hello", max_new_tokens=COUNT, ignore_eos=True)
            assert [ids_of(deltas)] == greedy(folder, ["hello"], COUNT)
    finally:
        node.stop()


@pytest.mark.usefixtures("forked")
async def test_a_node_with_another_set_up_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_model("opt", tmp_path / "opt")
    (other / "setup_config.json").write_text('{"engine": "deepspeed", "prefix_caching": false}')
    endpoint = f"127.0.0.1:{free_port()}"
    with joining(tmp_path / "node1.log", *as_arguments(other, endpoint)) as node:
        serving_alone = asyncio.create_task(never_ready(folder, **options(endpoint)))
        assert await asyncio.to_thread(node.process.wait, 90) == 1
        serving_alone.cancel()
        with suppress(asyncio.CancelledError):
            await serving_alone
    assert (
        "error: node 0 serves another set-up: config.json, prefix_caching, weights differ"
        in node.said
    )


def test_a_node_that_can_not_join_says_what_it_needs(folder: Path, tmp_path: Path) -> None:
    with joining(tmp_path / "log", folder, "--tensor-parallel", 2) as node:
        assert node.process.wait(60) == 1
    assert "error: a node that joins needs engine deepspeed, nnodes from 2" in node.said


@dataclass(frozen=True)
class Network:
    """A network namespace, and the end of its cable that is here."""

    name: str
    cable: str

    def plug(self, state: str) -> None:
        subprocess.run(["ip", "link", "set", self.cable, state], check=True)


@pytest.fixture
def network() -> Iterator[Network]:
    name, cable = f"triptych-{os.getpid()}", f"tri{os.getpid() % 10**6}"
    commands = [
        f"ip netns add {name}",
        f"ip link add {cable}a type veth peer name {cable}b netns {name}",
        f"ip addr add {OUTER}/24 dev {cable}a",
        f"ip link set {cable}a up",
        f"ip -n {name} addr add {INNER}/24 dev {cable}b",
        f"ip -n {name} link set {cable}b up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {error}")
        yield Network(name, f"{cable}a")
    finally:
        with suppress(OSError):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


async def test_a_node_that_is_cut_off_is_missed(
    network: Network, folder: Path, tmp_path: Path
) -> None:
    endpoint = f"{OUTER}:29411"
    arguments = as_arguments(folder, endpoint)
    with joining(tmp_path / "node1.log", *arguments, inside=network.name):
        async with serving(folder, **options(endpoint)) as runner:
            deltas = await collect(runner, "hello", max_new_tokens=COUNT, ignore_eos=True)
            assert [ids_of(deltas)] == greedy(folder, ["hello"], COUNT)
            ours = next(rank for rank in own_ranks())
            used = {c.laddr.ip.removeprefix("::ffff:") for c in ours.net_connections("tcp")}
            assert used == {OUTER}, "not on that network alone"
            stream = await runner.submit(request("hello", max_new_tokens=500, ignore_eos=True))
            iterator = aiter(stream)
            await anext(iterator)
            cut_at = time.monotonic()
            network.plug("down")
            with pytest.raises(RunnerUnavailable, match="rank 1 on another node hangs or is cut"):
                while True:
                    await anext(iterator)
            assert time.monotonic() - cut_at < 2 * HEARTBEAT_S
            network.plug("up")
            await wait_ready(runner)
            deltas = await collect(runner, "hello", max_new_tokens=COUNT, ignore_eos=True)
            assert [ids_of(deltas)] == greedy(folder, ["hello"], COUNT)
