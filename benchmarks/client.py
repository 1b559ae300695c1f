"""The client: sends requests and writes down when each piece of the answer came."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

import aiohttp

from benchmarks.metrics import Record, Window
from benchmarks.processes import CpuClock, ProcessTree
from benchmarks.workload import Request

REQUEST_TIMEOUT_S = 900.0


class RequestFailed(Exception):
    """A server answered with an error."""


class Dialect(Protocol):
    """How one kind of server is asked, and how its answer is read into the record."""

    async def send(
        self, session: aiohttp.ClientSession, url: str, request: Request, record: Record
    ) -> None:
        """Send one request and read its answer. Raises: RequestFailed, aiohttp's errors."""
        ...


class OpenAICompletions:
    """`POST /v1/completions` as server-sent events. `extra` fields go into every body.

    Where a server sends no usage, its events are counted: one for each token.
    """

    def __init__(self, model: str, *, sends_usage: bool = True, **extra: Any) -> None:
        self._sends_usage = sends_usage
        self._body = {"model": model, "temperature": 0, "stream": True} | extra

    async def send(
        self, session: aiohttp.ClientSession, url: str, request: Request, record: Record
    ) -> None:
        """See `Dialect`."""
        body = self._body | {"prompt": request.prompt, "max_tokens": request.output_tokens}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise RequestFailed(f"{answer.status}: {(await answer.text())[:300]}")
            async for event in _events(answer):
                if "error" in event:
                    raise RequestFailed(str(event["error"])[:300])
                # The model speaks nothing but text, so an event without any is no token.
                if any(choice.get("text") for choice in event.get("choices", ())):
                    record.events.append(time.monotonic())
                if usage := event.get("usage"):
                    record.tokens = usage["completion_tokens"]
                    record.counted_prompt = usage["prompt_tokens"]
        if not self._sends_usage:
            record.tokens = len(record.events)


class TorchServePredictions:
    """`POST /predictions/MODEL`, answered whole."""

    def __init__(self, model: str) -> None:
        self._path = f"/predictions/{model}"

    async def send(
        self, session: aiohttp.ClientSession, url: str, request: Request, record: Record
    ) -> None:
        """See `Dialect`."""
        body = {"prompt": request.prompt, "max_new_tokens": request.output_tokens}
        async with session.post(url + self._path, json=body) as answer:
            if answer.status != 200:
                raise RequestFailed(f"{answer.status}: {(await answer.text())[:300]}")
            content = await answer.json(content_type=None)
            record.tokens = content["tokens"]
            record.counted_prompt = content["prompt_tokens"]


async def ask(
    session: aiohttp.ClientSession, url: str, dialect: Dialect, request: Request
) -> Record:
    """One request; whatever goes wrong stands in the record."""
    record = Record(request.prompt_tokens, request.output_tokens, sent=time.monotonic())
    try:
        await dialect.send(session, url, request, record)
    except (RequestFailed, aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.end = time.monotonic()
    return record


async def run_closed_loop(
    url: str,
    dialect: Dialect,
    requests: Sequence[Request],
    *,
    concurrency: int,
    tree: ProcessTree,
) -> tuple[list[Record], Window]:
    """`concurrency` clients work off the list.

    The window ends when a client finds nothing more to begin: what follows is the tail, in which
    ever fewer clients are busy.
    """
    waiting = iter(requests)
    records: list[Record] = []
    start, cpu = time.monotonic(), CpuClock.read(tree)
    drained: list[Window] = []

    def begun(waiting: Iterator[Request]) -> Request | None:
        request = next(waiting, None)
        if request is None and not drained:
            drained.append(_window(start, cpu, tree))
        return request

    async with client_session() as session:

        async def client() -> None:
            while (request := begun(waiting)) is not None:
                records.append(await ask(session, url, dialect, request))

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return records, drained[0]


async def run_arrivals(
    url: str, dialect: Dialect, requests: Sequence[Request], *, tree: ProcessTree
) -> tuple[list[Record], Window]:
    """Send each request at its own time; the window ends with the last arrival."""
    start, cpu = time.monotonic(), CpuClock.read(tree)

    async with client_session() as session:

        async def arrive(request: Request) -> Record:
            await asyncio.sleep(start + request.at - time.monotonic())
            return await ask(session, url, dialect, request)

        tasks = [asyncio.create_task(arrive(request)) for request in requests]
        await asyncio.sleep(start + requests[-1].at - time.monotonic())
        window = _window(start, cpu, tree)
        return list(await asyncio.gather(*tasks)), window


def _window(start: float, began: CpuClock, tree: ProcessTree) -> Window:
    used = CpuClock.read(tree) - began
    return Window(start, time.monotonic(), used.server, used.others)


@contextlib.asynccontextmanager
async def client_session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session without a limit of connections, with one of its own for each request.

    llama.cpp's server closes a connection after a stream without saying so, and whoever uses it
    again fails.
    """
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield session


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    async for line in answer.content:
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)
