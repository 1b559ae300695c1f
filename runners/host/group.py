"""RankGroup: keeps one model's rank processes alive, from the HTTP worker.

Whatever ends first (a connection, the launcher, a deadline, a heartbeat) ends the session: requests
in flight fail at once, all processes are ended, and the next session starts. The pause before it
grows with each session that was not healthy for long. A group that failed to start several times in
a row, or whose start can never succeed, stays down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable

from runners.config.base import BaseRunnerConfig
from runners.contracts.errors import RunnerUnavailable
from runners.contracts.images import ImageModelInfo
from runners.contracts.runner import RunnerHealth, RunnerState
from runners.contracts.text import ModelInfo
from runners.host.session import RankSession, SessionEnd
from runners.protocol.messages import Broken, Fatal, HostMessage, Progress, RankMessage, Ready
from runners.protocol.spec import make_spec

logger = logging.getLogger("triptych.host")

MAX_FAILED_STARTS = 5
MAX_PAUSE_S = 30.0
HEALTHY_S = 60.0
"""A group that goes down sooner after it was ready may do so again and again."""
FOLDER_POLL_S = 1.0


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
        self._spec = make_spec(config, program)
        self._on_message = on_message
        self._on_down = on_down
        self._supervisor: asyncio.Task[None] | None = None
        self._session: RankSession | None = None
        self._state = RunnerState.STARTING
        self._detail = "not started yet"
        self._restarts = 0
        self._ready_at: float | None = None
        self._restart_reason: str | None = None
        self.info: ModelInfo | ImageModelInfo | None = None

    def health(self) -> RunnerHealth:
        """The state right now, summed over the ranks; never blocks."""
        beats = self._session.heartbeats.values() if self._session is not None else ()
        return RunnerHealth(
            state=self._state,
            detail=self._detail,
            restarts=self._restarts,
            running=sum(beat.running for beat in beats),
            waiting=sum(beat.waiting for beat in beats),
            kv_tokens_used=sum(beat.kv_tokens_used for beat in beats),
            kv_tokens_total=sum(beat.kv_tokens_total for beat in beats),
        )

    async def start(self) -> None:
        """Start the first session; returns at once."""
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
        """Send a message to a rank. Raises: RunnerUnavailable unless the group is ready."""
        if self._state is not RunnerState.READY or self._session is None:
            raise RunnerUnavailable(
                f"model {self._config.name} is not ready ({self._state}): {self._detail}"
            )
        self._session.send(message, rank)

    async def _supervise(self) -> None:
        failed_starts = short_sessions = 0
        while True:
            await self._wait_for_folder()
            self._ready_at = None
            end = await self._run_session()
            if self._state is RunnerState.READY:  # the supervision itself failed
                self._on_down(end.reason)
            was_ready = self._ready_at is not None
            failed_starts = 0 if was_ready else failed_starts + 1
            short_sessions = 0 if self._was_healthy() else short_sessions + 1
            # Another node may join, or come back, at any time.
            max_starts = MAX_FAILED_STARTS if self._config.rendezvous is None else math.inf
            if end.final or failed_starts >= max_starts:
                self._enter(RunnerState.FAILED, end.reason)
                return
            pause = min(MAX_PAUSE_S, 2.0 ** min(short_sessions, 10) - 1)
            reason = end.reason
            if was_ready and short_sessions > 1:
                reason += f" ({short_sessions} times in a row; the next start is in {pause:g} s)"
            self._restart_reason = end.reason
            self._restarts += 1
            self._enter(RunnerState.RESTARTING, reason)
            await asyncio.sleep(pause)

    def _was_healthy(self) -> bool:
        """Whether the last session was ready for so long that its end is no repetition."""
        return self._ready_at is not None and time.monotonic() - self._ready_at > HEALTHY_S

    async def _wait_for_folder(self) -> None:
        """Wait while the model's folder is missing; it may be on a volume that comes back."""
        while not await asyncio.to_thread(os.path.isdir, self._config.model_path):
            self._restart_reason = "the folder of the model is missing"
            self._enter(RunnerState.RESTARTING, self._restart_reason)
            await asyncio.sleep(FOLDER_POLL_S)

    async def _run_session(self) -> SessionEnd:
        if self._restart_reason is None:
            self._enter(RunnerState.STARTING, "starting the rank processes")
        try:
            async with RankSession(self._config, self._spec, self._handle) as self._session:
                end = await self._session.watch(lambda: self._state is RunnerState.READY)
                if self._state is RunnerState.READY:
                    # At once: ending the processes, and learning the cause, takes a moment.
                    self._enter(RunnerState.RESTARTING, end.reason)
                    self._on_down(end.reason)
                return await self._session.explain(end)
        except OSError as error:
            return SessionEnd(f"the rank processes could not be started: {error}")
        except Exception as error:
            logger.exception("watching the ranks failed")
            return SessionEnd(f"watching the rank processes failed: {type(error).__name__}")
        finally:
            self._session = None

    def _handle(self, message: RankMessage) -> None:
        match message:
            case Progress(state, detail):
                # During a restart `/readyz` shows the reason next to the progress.
                reason = self._restart_reason
                self._enter(state, f"{detail}; restarting because {reason}" if reason else detail)
            case Ready(info):
                self.info = info
                self._ready_at = time.monotonic()
                self._restart_reason = None
                self._enter(RunnerState.READY, f"{info.architecture} on {', '.join(info.devices)}")
            case Fatal(_, reason) if self._session is not None:
                self._session.end(reason, final=True)
            case Broken() if self._session is not None:
                self._session.report(message)
            case _:
                self._on_message(message)

    def _enter(self, state: RunnerState, detail: str) -> None:
        if (state, detail) != (self._state, self._detail):
            self._state, self._detail = state, detail
            failed = state in (RunnerState.FAILED, RunnerState.RESTARTING)
            logger.log(
                logging.ERROR if failed else logging.INFO,
                "model %s: %s: %s",
                self._config.name,
                state,
                detail,
            )
