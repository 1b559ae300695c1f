"""RankGroup: keeps one model's rank processes alive, from the HTTP worker.

Whatever ends first (a connection, the launcher, a deadline, a heartbeat) ends the life of the
group: what was in flight is failed at once, all processes are ended, and after a pause the next
life begins. A group that failed to start several times in a row, or says it never can, stays down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable

from runners.config.model import BaseRunnerConfig
from runners.contracts.errors import RunnerUnavailable
from runners.contracts.images import ImageModelInfo
from runners.contracts.runner import RunnerHealth, RunnerState
from runners.contracts.text import ModelInfo
from runners.host.session import End, Life
from runners.protocol.messages import (
    Broken,
    Fatal,
    HostMessage,
    ImageReady,
    Progress,
    RankMessage,
    Ready,
)
from runners.protocol.spec import spec_of

logger = logging.getLogger("triptych.ranks")

MAX_FAILED_STARTS = 5
MAX_PAUSE_S = 30.0


class RankGroup:
    """The processes that hold one model. All methods belong to one event loop.

    `on_message` gets every message of a rank that is not about the group itself. `on_down` is
    called with the reason, once each time a group that was ready goes down.
    """

    def __init__(
        self,
        config: BaseRunnerConfig,
        *,
        program: str,
        on_message: Callable[[RankMessage], None],
        on_down: Callable[[str], None],
    ) -> None:
        self._config = config
        self._spec = spec_of(config, program)
        self._on_message = on_message
        self._on_down = on_down
        self._supervisor: asyncio.Task[None] | None = None
        self._life: Life | None = None
        self._state = RunnerState.STARTING
        self._detail = "not started yet"
        self._restarts = 0
        self._was_ready = False
        self._why: str | None = None
        self.info: ModelInfo | ImageModelInfo | None = None

    def health(self) -> RunnerHealth:
        """The state right now; never blocks."""
        beat = self._life.last_beat if self._life is not None else None
        return RunnerHealth(
            state=self._state,
            detail=self._detail,
            restarts=self._restarts,
            running=beat.running if beat else 0,
            waiting=beat.waiting if beat else 0,
            kv_tokens_used=beat.kv_tokens_used if beat else 0,
            kv_tokens_total=beat.kv_tokens_total if beat else 0,
        )

    async def start(self) -> None:
        """Begin the first life; returns at once."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="rank-group")

    async def stop(self) -> None:
        """End all processes; none is left when this returns."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._enter(RunnerState.STOPPED, "stopped")

    def send(self, message: HostMessage, rank: int = 0) -> None:
        """Hand a rank a message. Raises: RunnerUnavailable unless the group is ready."""
        if self._state is not RunnerState.READY or self._life is None:
            raise RunnerUnavailable(
                f"model {self._config.name} is not ready ({self._state}): {self._detail}"
            )
        self._life.send(message, rank)

    async def _supervise(self) -> None:
        failed_starts = 0
        while True:
            self._was_ready = False
            end = await self._live_once()
            if self._state is RunnerState.READY:  # it ended by a fault of the watching itself
                self._on_down(end.reason)
            failed_starts = 0 if self._was_ready else failed_starts + 1
            # Another node may come, or come back, at any time.
            tries = MAX_FAILED_STARTS if self._spec.rendezvous is None else math.inf
            if end.final or failed_starts >= tries:
                self._enter(RunnerState.FAILED, end.reason)
                return
            self._why = end.reason
            self._restarts += 1
            self._enter(RunnerState.RESTARTING, end.reason)
            await asyncio.sleep(min(MAX_PAUSE_S, 2.0 ** min(failed_starts, 10) - 1))

    async def _live_once(self) -> End:
        if self._why is None:
            self._enter(RunnerState.STARTING, "starting the rank processes")
        try:
            async with Life(self._config, self._spec, self._handle) as self._life:
                end = await self._life.watch(lambda: self._state is RunnerState.READY)
                if self._state is RunnerState.READY:
                    # At once: ending the processes, and learning why, takes a moment.
                    self._enter(RunnerState.RESTARTING, end.reason)
                    self._on_down(end.reason)
                return await self._life.explain(end)
        except OSError as error:
            return End(f"the rank processes could not be started: {error}")
        except Exception as error:
            logger.exception("watching the ranks failed")
            return End(f"watching the rank processes failed: {type(error).__name__}")
        finally:
            self._life = None

    def _handle(self, message: RankMessage) -> None:
        match message:
            case Progress(state, detail):
                # During a restart `/readyz` goes on saying why, beside how far it is.
                why = f"; restarting because {self._why}" if self._why else ""
                self._enter(state, detail + why)
            case Ready(info) | ImageReady(info):
                self.info = info
                self._was_ready = True
                self._why = None
                self._enter(RunnerState.READY, f"{info.architecture} on {', '.join(info.devices)}")
            case Fatal(_, reason) if self._life is not None:
                self._life.end(reason, final=True)
            case Broken(rank, reason) if self._life is not None:
                self._life.end(reason, told_by=rank)
            case _:
                self._on_message(message)

    def _enter(self, state: RunnerState, detail: str) -> None:
        if (state, detail) != (self._state, self._detail):
            self._state, self._detail = state, detail
            bad = state in (RunnerState.FAILED, RunnerState.RESTARTING)
            logger.log(
                logging.ERROR if bad else logging.INFO,
                "model %s: %s: %s",
                self._config.name,
                state,
                detail,
            )
