"""Images per second: Triptych against plain diffusers behind FastAPI, with one and four clients.

Both serve the demo image model with the same prompts, seeds, steps and guidance scale.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
from typing_extensions import override

from benchmarks.cache import cached
from benchmarks.client import Dialect, RequestFailed, run_closed_loop
from benchmarks.metrics import Record, summarise
from benchmarks.servers.base import Launch, Server, executable, run_server
from benchmarks.servers.triptych import store_at
from benchmarks.workload import Request

STEPS = 20
GUIDANCE = 4.0
CONCURRENCIES = (1, 4)
PER_CLIENT = 6
"""Images that each client requests in one round."""
BATCH = 4
_PNG = b"\x89PNG"
_SHAPES = ("circle", "square", "triangle", "ring")
_COLOURS = ("red", "green", "blue", "yellow", "purple")


class ImageRoute(Dialect):
    """`POST /generate_image`. An image counts as one token, so the metrics of text apply."""

    @override
    async def send(
        self, session: aiohttp.ClientSession, url: str, request: Request, record: Record
    ) -> None:
        body = {
            "prompt": request.prompt,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "seed": request.prompt_tokens,
        }
        async with session.post(f"{url}/generate_image", json=body) as response:
            content = await response.read()
            if response.status != 200:
                raise RequestFailed(f"{response.status}: {content[:300]!r}")
            record.tokens = int(content.startswith(_PNG))


class TriptychImages:
    """This working tree with its default settings, except for the number of threads."""

    name = "triptych"
    ready_path = "/readyz"

    def dialect(self) -> Dialect:
        """The native route."""
        return ImageRoute()

    def prepare(self) -> str:
        """Write the model; nothing to install."""
        model_folder()
        return version("triptych")

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """Serve the model from its folder, with an empty model store."""
        variables = {
            "PORT": str(port),
            "TRIPTYCH_IMAGE_MODEL": str(model_folder()),
            "TRIPTYCH_NUM_THREADS": str(threads),
        }
        home = cached("stores/images", lambda folder: None)
        command = [executable("bentoml"), "serve", ".", "--host", "127.0.0.1"]
        return Launch(command, store_at(home) | variables)


class PlainDiffusers:
    """See `servers/diffusers_server.py`."""

    name = "diffusers"
    ready_path = "/ready"

    def dialect(self) -> Dialect:
        """The same route as Triptych's."""
        return ImageRoute()

    def prepare(self) -> str:
        """Nothing to install."""
        return version("diffusers")

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """In this Python environment."""
        command = [executable("python"), "-m", "benchmarks.servers.diffusers_server"]
        command += [str(model_folder()), str(port), str(threads)]
        return Launch(command, {"OMP_NUM_THREADS": str(threads)})


def model_folder() -> Path:
    """The folder of the demo image model, written the first time."""

    def write(folder: Path) -> None:
        from demo_models.image.build import write_demo_image_model

        write_demo_image_model(folder)

    return cached("image-model", write)


def requests(count: int, first: int = 0) -> list[Request]:
    """Requests whose `prompt_tokens` is used as the seed."""
    return [
        Request(f"a {_COLOURS[i % len(_COLOURS)]} {_SHAPES[i % len(_SHAPES)]}", i, output_tokens=1)
        for i in range(first, first + count)
    ]


def measure(threads: int, rounds: int, *, per_client: int = PER_CLIENT) -> list[dict[str, Any]]:
    """One entry per server, concurrency and round: images per second. Raises: Unavailable."""
    servers: Sequence[Server] = (TriptychImages(), PlainDiffusers())
    entries = []
    for number in range(1, rounds + 1):
        for server in servers:
            server.prepare()
            for rates in asyncio.run(_rates(server, threads, per_client)):
                entry = {"round": number, "server": server.name} | rates
                print(f"images {server.name:9} {rates['concurrency']}: {rates['rate']:.2f}/s")
                entries.append(entry)
    return entries


async def _rates(server: Server, threads: int, per_client: int) -> list[dict[str, Any]]:
    entries = []
    probe = requests(1)[0]
    async with run_server(
        server, probe, threads=threads, concurrency=max(CONCURRENCIES)
    ) as instance:
        await run_closed_loop(
            instance.url, instance.dialect, requests(BATCH), concurrency=BATCH, tree=instance.tree
        )
        for clients in CONCURRENCIES:
            records, window = await run_closed_loop(
                instance.url,
                instance.dialect,
                requests(clients * per_client, first=100),
                concurrency=clients,
                tree=instance.tree,
            )
            summary = summarise(records, window)
            elapsed = max(r.end for r in records) - min(r.sent for r in records)
            entries.append(
                {
                    "concurrency": clients,
                    # All clients start and end together, so there is no tail to exclude.
                    "rate": len(records) / elapsed,
                    "failed": summary.failed,
                    "seconds_per_batch": BATCH * elapsed / len(records),
                }
            )
    return entries
