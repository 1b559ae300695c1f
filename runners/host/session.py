"""One session of a rank group: its private folder, socket, launcher process and connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runners.config.base import BaseRunnerConfig
from runners.protocol.channel import encode_frame, read_rank_message
from runners.protocol.folders import process_folder
from runners.protocol.messages import (
    Broken,
    Heartbeat,
    Hello,
    HostMessage,
    RankMessage,
    Shutdown,
)
from runners.protocol.process import child_environment
from runners.protocol.spec import SOCKET, SPEC, RankSpec, read_outcome, write_private

WATCH_PERIOD_S = 0.25
RANK_EXIT_S = 3.0
LAUNCHER_EXIT_S = 6.0
LOST_RANK_S = 0.5
"""How long a report of a lost rank may precede the end of that rank's own connection."""
MAX_SOCKET_PATH = 103
"""Unix socket paths are short: 108 bytes on Linux, 104 on macOS, with a zero at the end."""
LONGEST_SOCKET = "pymp-12345678/listener-12345678"
"""Of the sockets in a session's folder: that of multiprocessing in a rank."""
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True)
class SessionEnd:
    """Why a session is over."""

    reason: str
    final: bool = False
    """Whether another session cannot succeed either."""
    reported_by: int | None = None
    """The rank that reported the reason."""


class RankSession:
    """The processes of a rank group from start to end, as an async context.

    `handle` gets every message of a rank except heartbeats. Leaving the context ends all processes
    and removes the folder.
    """

    def __init__(
        self, config: BaseRunnerConfig, spec: RankSpec, handle: Callable[[RankMessage], None]
    ) -> None:
        self._config = config
        self._spec = spec
        self._handle = handle
        self._end: asyncio.Future[SessionEnd] = asyncio.get_running_loop().create_future()
        self._start = time.monotonic()
        self._beat_times: dict[int, float] = {}
        self._step_ages: dict[int, float] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._rank_exited = False
        self._lost_another: set[int] = set()
        self.heartbeats: dict[int, Heartbeat] = {}
        """The last heartbeat of each rank."""

    async def __aenter__(self) -> RankSession:
        async with contextlib.AsyncExitStack() as stack:
            self._run_dir = _new_run_dir()
            stack.push_async_callback(
                asyncio.to_thread, shutil.rmtree, self._run_dir, ignore_errors=True
            )
            write_private(self._run_dir / SPEC, self._spec)
            path = self._run_dir / SOCKET
            server = await asyncio.start_unix_server(self._connected, path=str(path))
            stack.push_async_callback(self._disconnect, server)
            path.chmod(0o600)
            await self._launch()
            stack.push_async_callback(self._end_launcher)
            stack.callback(self._send_shutdown)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def _launch(self) -> None:
        self._launcher = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "runners.rank.launcher", str(self._run_dir), str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            env=child_environment(),
            # Ctrl-C in a terminal reaches the server only, which then stops its ranks in order.
            start_new_session=True,
        )
        self._exited = asyncio.create_task(self._launcher.wait())
        self._exited.add_done_callback(lambda _: self.end("the rank processes ended"))

    def _send_shutdown(self) -> None:
        for rank, writer in self._writers.items():
            with contextlib.suppress(OSError):
                self.send(Shutdown(), rank)
            writer.close()

    async def _disconnect(self, server: asyncio.Server) -> None:
        server.close()
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def send(self, message: HostMessage, rank: int = 0) -> None:
        """Write to a rank; a message after the end of its connection is dropped."""
        writer = self._writers[rank]
        if not writer.is_closing():  # uvloop's transports raise once they are closed
            writer.write(encode_frame(message))

    def end(self, reason: str, *, final: bool = False, reported_by: int | None = None) -> None:
        """Declare this session over; only the first reason counts."""
        if not self._end.done():
            self._end.set_result(SessionEnd(reason, final, reported_by))

    def report(self, broken: Broken) -> None:
        """End this session for what a rank reports.

        If it lost another rank, that one's connection ends too, and says which it was.
        """
        if broken.lost_another:
            self._lost_another.add(broken.rank)
            loop = asyncio.get_running_loop()
            loop.call_later(LOST_RANK_S, lambda: self.end(broken.reason))
        else:
            self.end(broken.reason, reported_by=broken.rank)

    async def watch(self, ready: Callable[[], bool]) -> SessionEnd:
        """Wait until this session is over; ends it when a deadline passes."""
        while not self._end.done():
            began = time.monotonic()
            await asyncio.wait({self._end}, timeout=WATCH_PERIOD_S)
            self._forgive(time.monotonic() - began - WATCH_PERIOD_S)
            if (reason := self._overdue(ready())) is not None:
                self.end(reason)
        return self._end.result()

    async def explain(self, end: SessionEnd) -> SessionEnd:
        """End the processes and add what the launcher saw; the ranks' output is in the log."""
        if self._rank_exited:
            # The rank is still exiting: give the launcher the time to see how.
            await asyncio.wait({self._exited}, timeout=RANK_EXIT_S)
        await self._end_launcher()
        outcome = read_outcome(self._run_dir)
        if outcome is None or end.final or end.reported_by == outcome.rank is not None:
            return end
        lines = [line.strip() for line in outcome.stderr_tail if line.strip()]
        errors = [line for line in lines if _EXCEPTION.match(line)]
        last = (errors or lines or [""])[-1]
        return SessionEnd(f"{outcome.reason}: {last}" if last else outcome.reason)

    def _forgive(self, delay: float) -> None:
        """Move every deadline by a delay of this process itself.

        A suspended process, or a blocked event loop, finds old heartbeats: newer ones are waiting
        to be read.
        """
        if delay > WATCH_PERIOD_S:
            self._start += delay
            self._beat_times = {rank: time + delay for rank, time in self._beat_times.items()}

    def _overdue(self, ready: bool) -> str | None:
        now, config = time.monotonic(), self._config
        if not ready and now - self._start > config.start_timeout:
            return f"not ready within start_timeout ({config.start_timeout:g} s)"
        for rank, beat_time in self._beat_times.items():
            # Local ranks send heartbeats from when they are ready, others from when they join.
            if now - beat_time > config.heartbeat_timeout:
                what = "hangs" if rank in self._writers else "on another node hangs or is cut off"
                return f"rank {rank} {what}: no heartbeat for {config.heartbeat_timeout:g} s"
        for rank, age in sorted(self._step_ages.items()):
            if age > config.step_timeout:
                return f"rank {rank} hangs: one step takes longer than {config.step_timeout:g} s"
        return None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs this callback as a task
        self._readers.add(task)
        try:
            hello = await read_rank_message(reader)
            if not isinstance(hello, Hello) or hello.rank in self._writers:
                return
            self._writers[hello.rank] = writer
            while (message := await read_rank_message(reader)) is not None:
                if isinstance(message, Heartbeat):
                    self._beat_times[message.rank] = time.monotonic()
                    self._step_ages[message.rank] = message.step_age
                    self.heartbeats[message.rank] = message
                else:
                    self._handle(message)
            self._rank_exited = True
            if hello.rank not in self._lost_another:
                self.end(f"rank {hello.rank} ended")
        except ValueError as error:
            self.end(f"a rank sent a message outside the schema: {error}")
        finally:
            writer.close()

    async def _end_launcher(self) -> None:
        """Have the launcher end its ranks; if it hangs, kill it, and the kernel kills the ranks."""
        if self._launcher.stdin is not None:
            self._launcher.stdin.close()
        _, pending = await asyncio.wait({self._exited}, timeout=LAUNCHER_EXIT_S)
        if pending:
            self._launcher.kill()
            await self._exited


def _new_run_dir() -> Path:
    """A private folder for one session. Raises: OSError."""
    parent = process_folder()
    run_dir = Path(tempfile.mkdtemp(prefix="", dir=parent))  # a short path, for the socket
    if len(str(run_dir / LONGEST_SOCKET)) > MAX_SOCKET_PATH:
        run_dir.rmdir()
        raise OSError(
            f"{parent.parent} is too long a path for a socket; set TMPDIR to a shorter one"
        )
    return run_dir
