"""The REST gateway of an MII deployment: which requests it refuses before it looks at them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from runners.engines.mii.deployment.gateway import serve_gateway

PAGE = [
    {"Origin": "https://example.com"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-origin"},
]
"""Headers of the requests that web pages make."""


@pytest.fixture
async def gateway() -> AsyncIterator[tuple[httpx.AsyncClient, asyncio.Task[None]]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    plan: Any = SimpleNamespace(
        name="kept", rest_host="127.0.0.1", rest_port=port, rest_limit=2, port=1
    )
    task = asyncio.create_task(serve_gateway(plan))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(200):
            with contextlib.suppress(httpx.ConnectError):
                if (await client.get("/healthz")).status_code == 200:
                    break
            await asyncio.sleep(0.02)
        yield client, task
        await client.get("/terminate")
    await asyncio.wait_for(task, 5)


async def test_only_clients_that_are_no_web_pages_can_use_it(
    gateway: tuple[httpx.AsyncClient, asyncio.Task[None]],
) -> None:
    client, task = gateway
    for headers in PAGE:
        assert (await client.get("/terminate", headers=headers)).status_code == 403
        answer = await client.post("/mii/kept", json={"prompts": "a"}, headers=headers)
        assert answer.status_code == 403
    plain = await client.post("/mii/kept", content='{"prompts": "a"}')
    assert plain.status_code == 415
    text = {"Content-Type": "text/plain"}
    assert (await client.post("/mii/kept", content="{}", headers=text)).status_code == 415
    # What is left reaches the deployment, of which there is none here.
    typed = {"Content-Type": "application/json; charset=utf-8"}
    assert (await client.post("/mii/kept", content="{}", headers=typed)).status_code == 400
    assert (await client.post("/mii/kept", json={"prompts": "a"})).status_code == 503
    # A person may open an address.
    opened = await client.get("/healthz", headers={"Sec-Fetch-Site": "none"})
    assert opened.status_code == 200
    assert not task.done()
