"""The HTTP client: sends requests and records the time of each event of the response."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

import aiohttp
from typing_extensions import override

from benchmarks.metrics import Record, Window
from benchmarks.processes import CpuClock, ProcessTree
from benchmarks.workload import Request

REQUEST_TIMEOUT_S = 900.0


class RequestFailed(Exception):
    """A server responded with an error."""


class Dialect(Protocol):
    """The API of a server: how a request is sent and how the response fills a `Record`."""

    async def send(
        self, session: aiohttp.ClientSession, url: str, request: Request, record: Record
    ) -> None:
        """Send one request and read the response. Raises: RequestFailed, aiohttp's errors."""
        ...


class OpenAICompletions(Dialect):
    """`POST /v1/completions` as server-sent events. `extra` fields are added to every body."""

    def __init__(self, model: str, **extra: Any) -> None:
        self._body = {"model": model, "temperature": 0, "stream": True} | extra

    @override
    async def send(
        self, session: aiohttp.ClientSession, url: str, request: Request, record: Record
    ) -> None:
        body = self._body | {"prompt": request.prompt, "max_tokens": request.output_tokens}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RequestFailed(f"{response.status}: {(await response.text())[:300]}")
            async for event in _events(response):
                if "error" in event:
                    raise RequestFailed(str(event["error"])[:300])
                # Every token of the model is text, so an event without text carries no token.
                if any(choice.get("text") for choice in event.get("choices", ())):
                    record.events.append(time.monotonic())
                if usage := event.get("usage"):
                    record.tokens = usage["completion_tokens"]
                    record.counted_prompt = usage["prompt_tokens"]


class TorchServePredictions(Dialect):
    """`POST /predictions/MODEL`, without streaming."""

    def __init__(self, model: str) -> None:
        self._path = f"/predictions/{model}"

    @override
    async def send(
        self, session: aiohttp.ClientSession, url: str, request: Request, record: Record
    ) -> None:
        body = {"prompt": request.prompt, "max_new_tokens": request.output_tokens}
        async with session.post(url + self._path, json=body) as response:
            if response.status != 200:
                raise RequestFailed(f"{response.status}: {(await response.text())[:300]}")
            content = await response.json(content_type=None)
            record.tokens = content["tokens"]
            record.counted_prompt = content["prompt_tokens"]


async def send_request(
    session: aiohttp.ClientSession, url: str, dialect: Dialect, request: Request
) -> Record:
    """Send one request; a failure is written to `Record.error`."""
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
    """Send the requests from `concurrency` clients, each waiting for its response before the next.

    The window ends when the first client finds no request left: in the tail after that fewer than
    `concurrency` clients are busy.
    """
    queue = iter(requests)
    records: list[Record] = []
    start, cpu = time.monotonic(), CpuClock.read(tree)
    windows: list[Window] = []

    def next_request(queue: Iterator[Request]) -> Request | None:
        request = next(queue, None)
        if request is None and not windows:
            windows.append(_window(start, cpu, tree))
        return request

    async with client_session() as session:

        async def client() -> None:
            while (request := next_request(queue)) is not None:
                records.append(await send_request(session, url, dialect, request))

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return records, windows[0]


async def run_poisson(
    url: str, dialect: Dialect, requests: Sequence[Request], *, tree: ProcessTree
) -> tuple[list[Record], Window]:
    """Send each request at its time `at`; the window ends when the last one is sent."""
    start, cpu = time.monotonic(), CpuClock.read(tree)

    async with client_session() as session:

        async def send_at_its_time(request: Request) -> Record:
            await asyncio.sleep(start + request.at - time.monotonic())
            return await send_request(session, url, dialect, request)

        tasks = [asyncio.create_task(send_at_its_time(request)) for request in requests]
        await asyncio.sleep(start + requests[-1].at - time.monotonic())
        window = _window(start, cpu, tree)
        return list(await asyncio.gather(*tasks)), window


def _window(start: float, cpu: CpuClock, tree: ProcessTree) -> Window:
    usage = CpuClock.read(tree) - cpu
    return Window(start, time.monotonic(), usage.server, usage.others)


@contextlib.asynccontextmanager
async def client_session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session with a new connection for each request and no limit on their number.

    llama.cpp's server closes a connection after a stream without announcing it, so the next request
    on that connection would fail.
    """
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield session


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    async for line in response.content:
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)
