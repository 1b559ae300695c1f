"""One life of a rank group: its private folder, socket, launcher process and connections."""

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

from runners.config.model import BaseRunnerConfig
from runners.protocol.channel import encode_frame, read_rank_message
from runners.protocol.messages import Heartbeat, Hello, HostMessage, RankMessage, Shutdown
from runners.protocol.process import PRIVATE_VARIABLES, PROJECT_ROOT
from runners.protocol.spec import SOCKET, SPEC, RankSpec, read_outcome, write_private

WATCH_PERIOD_S = 0.25
RANK_EXIT_S = 3.0
LAUNCHER_EXIT_S = 6.0
RUN_DIR_PREFIX = "triptych-"
MAX_SOCKET_PATH = 100
"""Unix sockets have short names: 108 bytes on Linux, 104 on macOS."""
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True)
class End:
    """Why a life is over."""

    reason: str
    final: bool = False
    """Whether another can not do better."""
    told_by: int | None = None
    """The rank that said it of itself."""


class Life:
    """The processes of a rank group from start to end, as an async context.

    `handle` gets every message of a rank but its heartbeats. Leaving the context ends all
    processes and removes the folder.
    """

    def __init__(
        self, config: BaseRunnerConfig, spec: RankSpec, handle: Callable[[RankMessage], None]
    ) -> None:
        self._config = config
        self._spec = spec
        self._handle = handle
        self._end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._began = time.monotonic()
        self._beats: dict[int, float] = {}
        self._step_ages: dict[int, float] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._rank_left = False
        self.last_beat: Heartbeat | None = None

    async def __aenter__(self) -> Life:
        async with contextlib.AsyncExitStack() as opened:
            self._run_dir = _new_run_dir()
            opened.push_async_callback(
                asyncio.to_thread, shutil.rmtree, self._run_dir, ignore_errors=True
            )
            write_private(self._run_dir / SPEC, self._spec)
            path = self._run_dir / SOCKET
            server = await asyncio.start_unix_server(self._connected, path=str(path))
            opened.push_async_callback(self._disconnect, server)
            path.chmod(0o600)
            await self._launch()
            opened.push_async_callback(self._end_launcher)
            opened.callback(self._say_goodbye)
            self._opened = opened.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._opened.aclose()

    async def _launch(self) -> None:
        search = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
        env = {k: v for k, v in os.environ.items() if k not in PRIVATE_VARIABLES}
        self._launcher = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "runners.rank.launcher", str(self._run_dir), str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            env=env | {"PYTHONPATH": search},
            # Ctrl-C in a terminal is for the server, which then stops its ranks in order.
            start_new_session=True,
        )
        self._exited = asyncio.create_task(self._launcher.wait())
        self._exited.add_done_callback(lambda _: self.end("the rank processes ended"))

    def _say_goodbye(self) -> None:
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
        """Write to a rank; what it is too late for, this life's end answers."""
        writer = self._writers[rank]
        if not writer.is_closing():  # uvloop's transports raise once they are closed
            writer.write(encode_frame(message))

    def end(self, reason: str, *, final: bool = False, told_by: int | None = None) -> None:
        """Declare this life over; only the first reason counts."""
        if not self._end.done():
            self._end.set_result(End(reason, final, told_by))

    async def watch(self, ready: Callable[[], bool]) -> End:
        """Wait until this life is over, or ends it when a deadline passes."""
        while not self._end.done():
            await asyncio.wait({self._end}, timeout=WATCH_PERIOD_S)
            if (reason := self._overdue(ready())) is not None:
                self.end(reason)
        return self._end.result()

    async def explain(self, end: End) -> End:
        """End the processes and say what the launcher saw; what ranks print is in the log."""
        if self._rank_left:
            # A rank that ends by itself is still busy dying: let the launcher see how.
            await asyncio.wait({self._exited}, timeout=RANK_EXIT_S)
        await self._end_launcher()
        outcome = read_outcome(self._run_dir)
        if outcome is None or end.final or end.told_by == outcome.rank is not None:
            return end
        said = [line.strip() for line in outcome.stderr_tail if line.strip()]
        errors = [line for line in said if _EXCEPTION.match(line)]
        last = (errors or said or [""])[-1]
        return End(f"{outcome.reason}: {last}" if last else outcome.reason)

    def _overdue(self, ready: bool) -> str | None:
        now, config = time.monotonic(), self._config
        if not ready and now - self._began > config.start_timeout:
            return f"not ready within start_timeout ({config.start_timeout:g} s)"
        for rank, beat in self._beats.items():
            # Ranks here beat from when they are ready, those elsewhere from when they join.
            if now - beat > config.heartbeat_timeout:
                what = "hangs" if rank in self._writers else "on another node hangs or is cut off"
                return f"rank {rank} {what}: no sign of life for {config.heartbeat_timeout:g} s"
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
                    self._beats[message.rank] = time.monotonic()
                    self._step_ages[message.rank] = message.step_age
                    self.last_beat = message if message.rank == 0 else self.last_beat
                else:
                    self._handle(message)
            self._rank_left = True
            self.end(f"rank {hello.rank} ended")
        except ValueError as error:
            self.end(f"a rank sent a message outside the schema: {error}")
        finally:
            writer.close()

    async def _end_launcher(self) -> None:
        """Let the launcher end its ranks and go; kill it if it hangs, and the kernel kills them."""
        if self._launcher.stdin is not None:
            self._launcher.stdin.close()
        _, pending = await asyncio.wait({self._exited}, timeout=LAUNCHER_EXIT_S)
        if pending:
            self._launcher.kill()
            await self._exited


def _new_run_dir() -> Path:
    """A private folder named after this process. Removes those that killed processes left.

    Raises: OSError.
    """
    parent = Path(tempfile.gettempdir())
    for old in parent.glob(f"{RUN_DIR_PREFIX}*-*"):
        owner = old.name.removeprefix(RUN_DIR_PREFIX).partition("-")[0]
        if owner.isdigit() and not _exists(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    run_dir = Path(tempfile.mkdtemp(prefix=f"{RUN_DIR_PREFIX}{os.getpid()}-", dir=parent))
    if len(str(run_dir / SOCKET)) > MAX_SOCKET_PATH:
        run_dir.rmdir()
        raise OSError(f"{parent} is too long a path for a socket; set TMPDIR to a shorter one")
    return run_dir


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
