"""Processes that render chat templates and tokenise for a rank, each call within bounds.

A chat template is a program that comes with the model, and a tokenizer may need very long for a
text. A thread cannot be stopped in either; a process can. `tokenizer_pool` gives them work.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import msgspec
import psutil

from runners.contracts.errors import (
    ConfigError,
    EngineFailure,
    InvalidRequest,
    TriptychError,
    from_wire,
    reraise_as,
)
from runners.contracts.text import ChatPrompt, Prompt
from runners.protocol.logs import configure_logging
from runners.protocol.messages import CallFailed, Detokenize, Text, Tokenize, Tokens, call_failed
from runners.protocol.process import ignore_signals
from runners.rank.memory import machine_memory
from runners.text.tokenization import PromptTokenizer

POLL_S = 0.25
"""A call that lasts longer ends with its process as soon as its request is aborted."""
PROCESS_NAME = "tokenizer"


@dataclass(frozen=True)
class CallLimits:
    """What one call may take; the process of a call that takes more is ended."""

    render_s: float = 2.0
    """CPU time of the chat template, in seconds."""
    cpu_s: float = 10.0
    """CPU time of the whole call, in seconds."""
    wall_s: float = 60.0
    """Seconds after which a process that does not answer is ended, whatever it waits for."""
    memory: int = 2 * 1024**3
    """Bytes that the process may allocate."""
    kept_memory: int = 256 * 1024**2
    """A process that has grown by more bytes than this after a call is replaced."""


Call = Tokenize | Detokenize
Answer = Tokens | Text | CallFailed

logger = logging.getLogger("triptych.text")
_starting_or_ending = threading.Lock()
"""multiprocessing looks for all ended children whenever it starts one: of two threads that read the
exit code of a process, one gets none."""
_encoder = msgspec.msgpack.Encoder()
_calls = msgspec.msgpack.Decoder(Call)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def default_limits() -> CallLimits:
    """The limits on this machine, of whose memory a call gets an eighth at most."""
    return CallLimits(memory=min(CallLimits.memory, machine_memory().total // 8))


def start_fork_server() -> None:
    """Start the process that `TokenizerProcess` forks its own from, unless it runs.

    It needs a second or two until it has imported what they need, which is no torch; after that a
    fork takes milliseconds.
    """
    multiprocessing.set_forkserver_preload([__name__])
    with _hidden_main():
        forkserver.ensure_running()


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep multiprocessing from importing the rank's main module in a process that it starts."""
    main = sys.modules["__main__"]
    spec, file = main.__spec__, getattr(main, "__file__", None)
    main.__spec__ = main.__file__ = None
    try:
        yield
    finally:
        main.__spec__, main.__file__ = spec, file


class TokenizerProcess:
    """A process that answers one call at a time; a call that it did not survive is refused.

    It is started for the first call, and again for the first one after its end. Raises: ConfigError
    for a tokenizer that cannot be pickled.
    """

    def __init__(self, tokenizer: PromptTokenizer, limits: CallLimits | None = None) -> None:
        self._tokenizer = tokenizer
        what = f"{type(tokenizer.tokenizer).__name__} cannot be copied into another process"
        with reraise_as(ConfigError, what):
            self._pickled = bytes(ForkingPickler.dumps(tokenizer))
        self._limits = limits or default_limits()
        self._process: BaseProcess | None = None
        self.is_wanted: Callable[[], bool] = lambda: True
        """Whether the current call is not aborted."""

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises: InvalidRequest, ContextLengthExceeded, EngineFailure."""
        if isinstance(prompt, list):
            return self._tokenizer.encode(prompt)  # only checks the ids
        answer = self.answer(Tokenize(0, prompt, add_special_tokens=True))
        return answer.token_ids if isinstance(answer, Tokens) else _raise(answer)

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens included. Raises: InvalidRequest, EngineFailure."""
        answer = self.answer(Detokenize(0, token_ids, skip_special_tokens=False))
        return answer.text if isinstance(answer, Text) else _raise(answer)

    def answer(self, call: Call) -> Answer:
        """The answer to a call, also if it fails."""
        try:
            self.start()
            self._connection.send_bytes(_encoder.encode(call))
            deadline = time.monotonic() + self._limits.wall_s
            while not self._connection.poll(POLL_S):
                if not self.is_wanted():
                    self.close()
                    return call_failed(call.call_id, EngineFailure("the call was aborted"))
                if time.monotonic() > deadline:
                    raise TimeoutError
            answer = _answers.decode(self._connection.recv_bytes())
        except (OSError, EOFError):
            error = _end_error(call, self._limits, self.close())
            logger.warning("a tokenizer process ended: %s", error)
            return call_failed(call.call_id, error)
        if self._memory() > self._memory_at_start + self._limits.kept_memory:
            self.close()
        return answer

    def start(self) -> None:
        """Start the process unless it runs. Raises: OSError, EOFError."""
        if self._process is not None:
            return
        start_fork_server()
        context = multiprocessing.get_context("forkserver")
        self._connection, other_end = context.Pipe()
        with other_end:
            process = context.Process(
                target=_serve, args=(other_end, self._pickled, self._limits), daemon=True
            )
            with _starting_or_ending, _hidden_main():
                process.start()
        self._process = process
        try:
            if not self._connection.poll(self._limits.wall_s):
                raise TimeoutError
            self._connection.recv_bytes()  # it is ready
        except BaseException:
            self.close()
            raise
        self._memory_at_start = self._memory()

    def close(self) -> int | None:
        """End the process, if there is one. Returns its exit code, as `Process.exitcode` does."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._connection.close()
        process.kill()  # one that has ended keeps its exit code
        with _starting_or_ending:
            process.join()
        return process.exitcode

    def _memory(self) -> int:
        """Resident memory of the process in bytes."""
        assert self._process is not None  # noqa: S101 - it was started
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.NoSuchProcess:  # killed by somebody else: the next call will see it
            return 0


def _serve(connection: Connection, pickled: bytes, limits: CallLimits) -> None:
    """In the process: answer calls until the rank ends."""
    ignore_signals()
    configure_logging(rank=int(os.environ.get("RANK", "0")))
    tokenizer: PromptTokenizer = ForkingPickler.loads(pickled)
    threading.Thread(target=_end_with_rank, args=(connection,), daemon=True).start()
    _set_up_process(limits.memory)
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send_bytes(b"")
        while True:
            call = _calls.decode(connection.recv_bytes())
            with _cpu_limit(signal.ITIMER_PROF, limits.cpu_s):
                answer = _answer(tokenizer, call, limits)
            connection.send_bytes(_encoder.encode(answer))


def _answer(tokenizer: PromptTokenizer, call: Call, limits: CallLimits) -> Answer:
    try:
        if isinstance(call, Detokenize):
            text = tokenizer.decode(call.token_ids, skip_special_tokens=call.skip_special_tokens)
            return Text(call.call_id, text)
        prompt, add_special_tokens = call.prompt, call.add_special_tokens
        if isinstance(prompt, ChatPrompt):
            with _cpu_limit(signal.ITIMER_VIRTUAL, limits.render_s):
                prompt = tokenizer.render(prompt)
            add_special_tokens = False  # the template has written them
        ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        return Tokens(call.call_id, ids)
    except MemoryError:
        os.abort()  # as a tokenizer in Rust does; what is left of the memory may not do for others
    except BaseException as error:  # a panic of a tokenizer in Rust is none of Exception
        return call_failed(call.call_id, error)


def _end_with_rank(connection: Connection) -> None:
    """In a thread: end this process when the rank ends, also in the middle of a call."""
    poller = select.poll()
    poller.register(connection, 0)  # the end of the other side is always reported
    poller.poll()
    os._exit(0)


@contextlib.contextmanager
def _cpu_limit(timer: int, seconds: float) -> Iterator[None]:
    """End this process if the block takes longer: by SIGPROF or SIGVTALRM, depending on `timer`."""
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0.0)


def _set_up_process(memory: int) -> None:
    """Name this process and bound its memory."""
    # With them, a tokenizer in Rust that gets no memory waits for ever for its lock.
    os.environ["RUST_BACKTRACE"] = "0"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(PROCESS_NAME)
        # Where memory is short, the kernel ends this process first.
        Path("/proc/self/oom_score_adj").write_text("1000")
    limit = psutil.Process().memory_info().vms + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_error(call: Call, limits: CallLimits, exit_code: int | None) -> TriptychError:
    """Why a process ended during a call."""
    if exit_code == -signal.SIGVTALRM:
        return InvalidRequest(
            f"the model's chat template exceeded {limits.render_s:g} s of CPU time",
            field="messages",
        )
    if exit_code == -signal.SIGPROF:
        return InvalidRequest(
            f"the tokenizer exceeded {limits.cpu_s:g} s of CPU time", field=_field(call)
        )
    if exit_code == -signal.SIGABRT:
        what = "the tokenizer"
        if _field(call) == "messages":
            what = "the model's chat template or tokenizer"
        mib = limits.memory // 1024**2
        return InvalidRequest(f"{what} needs more than {mib} MiB of memory", field=_field(call))
    return EngineFailure(f"the tokenizer process hangs or was ended: exit code {exit_code}")


def _field(call: Call) -> str:
    """The field of the request that a call is about."""
    if isinstance(call, Detokenize):
        return "tokens"
    return "messages" if isinstance(call.prompt, ChatPrompt) else "prompt"


def _raise(answer: Answer) -> Any:
    assert isinstance(answer, CallFailed)  # noqa: S101 - the process answers what it was asked
    raise from_wire(answer.error, answer.reason, answer.field)
