"""A rank that is killed or stops: requests are told, the model comes back, and nothing is left.

Other files have the same for text on Accelerate and DeepSpeed (`test_supervision`,
`test_split_faults`), for the launcher, for deployments of MII and for the HTTP worker.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runners import create_runner
from runners.config.files import load_setup_config
from runners.contracts.errors import RunnerUnavailable
from runners.contracts.tasks import TaskRequest
from runners.protocol.folders import process_folder
from tests.support.generating import request, started, wait_ready
from tests.support.image_models import write_image_model
from tests.support.images import image_request
from tests.support.models import write_model
from tests.support.processes import alive, own_ranks, stop
from tests.support.task_models import write_task_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("forked_ranks")]
_ids = itertools.count()


@dataclass(frozen=True)
class Kind:
    """A kind of model."""

    write: Callable[[Path], Path]
    short: Callable[[], Any]
    """A request whose answer is always the same."""
    long: Callable[[], Any]
    """One that is still running when it is killed; the same where none takes long."""
    overrides: dict[str, Any]


def mask_filling() -> TaskRequest:
    return TaskRequest(request_id=f"task-{next(_ids)}", text="the cat sat on a [MASK]")


def a_word() -> Any:
    return request("hello", max_new_tokens=4, ignore_eos=True, temperature=0.0)


def a_long_prompt() -> Any:
    return request([5] * 400, max_new_tokens=100, ignore_eos=True)


KINDS = {
    "mii": Kind(
        lambda folder: write_model("llama", folder), a_word, a_long_prompt, {"engine": "mii"}
    ),
    "task": Kind(
        lambda folder: write_task_model("fill-mask", folder), mask_filling, mask_filling, {}
    ),
    "image": Kind(
        lambda folder: write_image_model("stable-diffusion", folder),
        lambda: image_request(seed=1),
        lambda: image_request(num_inference_steps=150),
        {},
    ),
}


@dataclass(frozen=True)
class Served:
    """A kind of model, and its runner."""

    kind: Kind
    runner: Any

    async def result(self, submitted: Any) -> list[Any]:
        """What a request's events say, without its id."""
        async with await self.runner.submit(submitted) as stream:
            events = [event async for event in stream]
        return [
            getattr(event, "token_ids", None)
            or getattr(event, "findings", None)
            or getattr(event, "image", None)
            for event in events
        ]


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=[pytest.param(k, id=n) for n, k in KINDS.items()]
)
async def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    forked_ranks: None,
) -> AsyncIterator[Served]:
    """One runner of each kind for all its tests; nothing of it is left in the end."""
    kind = request.param
    if "engine" in kind.overrides:
        pytest.importorskip("mii")
    folder = kind.write(tmp_path_factory.mktemp("models") / "tiny")
    overrides = {"num_threads": 1, "heartbeat_timeout": 2} | kind.overrides
    config, _ = load_setup_config(folder, name="tiny", overrides=overrides)
    async with started(create_runner(config)) as runner:
        yield Served(kind, runner)
    assert own_ranks() == []
    assert list(process_folder().iterdir()) == []


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
async def test_what_is_in_flight_is_told_and_the_model_comes_back(
    served: Served, fault: signal.Signals
) -> None:
    runner, kind, [rank] = served.runner, served.kind, own_ranks()
    want = await served.result(kind.short())
    if fault is signal.SIGSTOP or kind.long is kind.short:
        stop(rank)  # the request stays in the socket
    asked = asyncio.create_task(served.result(kind.long()))
    await asyncio.sleep(0.05)  # in its first steps
    rank.send_signal(fault)
    with pytest.raises(RunnerUnavailable, match="went down with the request in flight: rank 0"):
        async with asyncio.timeout(10):
            await asked
    await wait_ready(runner)
    assert alive([rank]) == []
    assert await served.result(kind.short()) == want
