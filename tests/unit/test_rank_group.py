"""When a rank group is started again, how soon, and what is said; with sessions that do nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from runners.config.base import BaseRunnerConfig
from runners.config.files import load_setup_config
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.host import group, session
from runners.host.group import RankGroup
from runners.host.session import RankSession, SessionEnd
from runners.protocol.channel import encode_frame
from runners.protocol.messages import Broken, Heartbeat, Hello, RankMessage, Ready
from runners.protocol.spec import make_spec

INFO = ModelInfo(
    architecture="Llama",
    engine="accelerate",
    parameters=1,
    dtype="float32",
    devices=["cpu"],
    max_context=8,
    vocab_size=8,
    max_kv_tokens=8,
    has_chat_template=False,
    default_temperature=0.0,
)


@pytest.fixture
def config(tmp_path: Path) -> BaseRunnerConfig:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return load_setup_config(tmp_path / "m", name="m", overrides={})[0]


class Sessions:
    """Stands in for `RankSession`: every session is ready, unless told not to be, and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pauses: list[float] = []
        self.get_ready = True
        self.count = 0
        self._real_sleep = asyncio.sleep
        monkeypatch.setattr(group, "RankSession", self._make)
        monkeypatch.setattr(asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await self._real_sleep(0)

    def _make(self, _: object, __: object, handle: Callable[[RankMessage], None]) -> Sessions:
        self._handle = handle
        return self

    async def __aenter__(self) -> Sessions:
        self.count += 1
        if self.get_ready:
            self._handle(Ready(INFO))
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def watch(self, _: object) -> SessionEnd:
        return SessionEnd("rank 0 was killed by SIGKILL")

    async def explain(self, end: SessionEnd) -> SessionEnd:
        return end

    heartbeats: dict[int, Heartbeat] = {}  # noqa: RUF012


def make(config: BaseRunnerConfig) -> RankGroup:
    return RankGroup(config, program="", on_message=lambda _: None, on_down=lambda _: None)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)


async def test_a_group_that_does_not_stay_up_pauses_longer_each_time(
    config: BaseRunnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(monkeypatch)
    details = set()
    ranks = make(config)
    await ranks.start()

    def seven_pauses() -> bool:
        details.add(ranks.health().detail)
        return len(sessions.pauses) >= 7

    await until(seven_pauses)
    await ranks.stop()
    assert sessions.pauses[:7] == [1, 3, 7, 15, 30, 30, 30]
    assert any(
        "killed by SIGKILL (2 times in a row; the next start is in 3 s)" in d for d in details
    )


async def test_a_long_healthy_time_ends_the_pauses(
    config: BaseRunnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(monkeypatch)
    ranks = make(config)
    await ranks.start()
    await until(lambda: len(sessions.pauses) >= 3)
    monkeypatch.setattr(group, "HEALTHY_S", -1.0)
    await until(lambda: 0 in sessions.pauses)
    await ranks.stop()


async def test_starts_that_fail_in_a_row_are_given_up(
    config: BaseRunnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was before them."""
    sessions = Sessions(monkeypatch)
    ranks = make(config)
    await ranks.start()
    await until(lambda: sessions.count >= 8)
    sessions.get_ready = False
    await until(lambda: ranks.health().state is RunnerState.FAILED)
    await ranks.stop()


async def test_a_model_whose_folder_is_missing_waits_for_it(
    config: BaseRunnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(monkeypatch)
    away = config.model_path.rename(config.model_path.with_name("away"))
    ranks = make(config)
    await ranks.start()
    await until(lambda: len(sessions.pauses) >= 20)
    assert (sessions.count, ranks.health().state) == (0, RunnerState.RESTARTING)
    assert ranks.health().detail == "the folder of the model is missing"
    away.rename(config.model_path)
    await until(lambda: sessions.count > 0)
    await ranks.stop()


@pytest.fixture
async def connected(
    config: BaseRunnerConfig, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RankSession]:
    """A session without a launcher, whose two ranks are connected."""

    async def launch(session: Any) -> None:
        session._exited = asyncio.get_running_loop().create_future()

    async def end_launcher(_: object) -> None:
        pass

    monkeypatch.setattr(RankSession, "_launch", launch)
    monkeypatch.setattr(RankSession, "_end_launcher", end_launcher)
    monkeypatch.setattr(session, "LOST_RANK_S", 0.2)
    async with RankSession(config, make_spec(config, ""), lambda _: None) as running:
        yield running


async def test_the_lost_rank_is_named_and_not_the_one_that_missed_it(
    connected: RankSession,
) -> None:
    writers = []
    for rank in (0, 1):
        _, writer = await asyncio.open_unix_connection(connected._run_dir / "channel.sock")
        writer.write(encode_frame(Hello(rank, 1)))
        writers.append(writer)
    await until(lambda: len(connected._writers) == 2)
    connected.report(Broken(0, "rank 0 lost the connection to another rank", lost_another=True))
    writers[0].close()
    await asyncio.sleep(0.05)
    writers[1].close()
    assert (await connected.watch(lambda: True)).reason == "rank 1 ended"


async def test_a_rank_lost_on_another_node_is_told_too(connected: RankSession) -> None:
    connected.report(Broken(0, "rank 0 lost the connection to another rank", lost_another=True))
    end = await connected.watch(lambda: True)
    assert end.reason == "rank 0 lost the connection to another rank"
