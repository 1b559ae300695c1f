"""`python openvino_server.py MODEL PORT THREADS SEQUENCES KV_TOKENS PROPERTIES`.

OpenVINO GenAI's continuous batching behind `POST /v1/completions`: OpenVINO has a pipeline, but no
server in Python. Its `step` holds the GIL, so it runs in a separate process, as other servers'
engines do, and never delays the streams. This script runs with OpenVINO on the path and cannot
import this project.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from aiohttp import web

STEP_TOKENS = 512
"""Triptych's default `max_step_tokens`."""


class Job(NamedTuple):
    """A request to the engine."""

    id: int
    prompt: str
    max_tokens: int


class Piece(NamedTuple):
    """The text a step added to a request; the last one has `usage`, (prompt, completion) tokens."""

    id: int
    text: str
    usage: tuple[int, int] | None


class Engine:
    """The pipeline, in a separate process."""

    def __init__(self, channel: Connection, folder: str, threads: int, sequences: int,
                 kv_tokens: int, properties: dict[str, str]) -> None:  # fmt: skip
        genai = importlib.import_module("openvino_genai")
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = sequences
        scheduler.max_num_batched_tokens = STEP_TOKENS
        scheduler.num_kv_blocks = kv_tokens // 32  # tokens per block on a CPU
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False  # all prompts differ
        self._genai = genai
        self._channel = channel
        self._pipeline = genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", properties | {"INFERENCE_NUM_THREADS": str(threads)}
        )
        self._tokenizer = self._pipeline.get_tokenizer()
        self._running: dict[int, Any] = {}
        self._counts: dict[int, list[int]] = {}

    def run(self) -> None:
        """Receive jobs and step until the other side closes the channel."""
        try:
            while True:
                while self._channel.poll(None if not self._running else 0):
                    self._add(self._channel.recv())
                self._pipeline.step()
                self._channel.send(self._pieces())
        except (EOFError, OSError):
            return

    def _add(self, job: Job) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = job.max_tokens
        config.do_sample = False
        config.ignore_eos = True
        ids = self._tokenizer.encode(job.prompt, add_special_tokens=False).input_ids
        self._counts[job.id] = [ids.shape[1], 0]
        self._running[job.id] = self._pipeline.add_request(job.id, ids, config)

    def _pieces(self) -> list[Piece]:
        new = {
            i: [token for output in handle.read().values() for token in output.generated_ids]
            for i, handle in self._running.items()
            if handle.can_read()
        }
        texts = self._tokenizer.decode(list(new.values())) if new else []
        running = self._genai.GenerationStatus.RUNNING
        pieces = []
        for (i, tokens), text in zip(new.items(), texts, strict=True):
            self._counts[i][1] += len(tokens)
            usage = None
            if self._running[i].get_status() != running:
                del self._running[i]
                prompt, completion = self._counts.pop(i)
                usage = (prompt, completion)
            pieces.append(Piece(i, text, usage))
        return pieces


class Frontend:
    """The HTTP side."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._ids = itertools.count()
        self._queues: dict[int, asyncio.Queue[Piece]] = {}

    async def watch(self, app: web.Application) -> None:
        """Route the engine's messages to the requests."""
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._receive)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Stream one completion."""
        body = await request.json()
        job = Job(next(self._ids), body["prompt"], body["max_tokens"])
        queue = self._queues[job.id] = asyncio.Queue()
        self._channel.send(job)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:
            piece = await queue.get()
            await response.write(_event(piece))
            if piece.usage is not None:
                break
        await response.write(b"data: [DONE]\n\n")
        return response

    async def health(self, request: web.Request) -> web.Response:
        """The engine was loaded before the port was opened."""
        return web.Response(text="ok")

    def _receive(self) -> None:
        for piece in self._channel.recv():
            self._queues[piece.id].put_nowait(piece)
            if piece.usage is not None:
                del self._queues[piece.id]


def _event(piece: Piece) -> bytes:
    event: dict[str, Any] = {"choices": [{"index": 0, "text": piece.text}]}
    if piece.usage is not None:
        event["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), piece.usage, strict=True))
    return f"data: {json.dumps(event)}\n\n".encode()


def _engine(channel: Connection, *settings: Any) -> None:
    engine = Engine(channel, *settings)
    channel.send("ready")
    engine.run()


def main() -> None:
    """Serve until terminated."""
    folder, port, threads, sequences, kv_tokens, properties = sys.argv[1:]
    context = multiprocessing.get_context("spawn")
    channel, engine_channel = context.Pipe()
    settings = (folder, int(threads), int(sequences), int(kv_tokens), json.loads(properties))
    context.Process(target=_engine, args=(engine_channel, *settings), daemon=True).start()
    engine_channel.close()
    channel.recv()
    frontend = Frontend(channel)
    app = web.Application()
    app.on_startup.append(frontend.watch)
    app.router.add_post("/v1/completions", frontend.completions)
    app.router.add_get("/health", frontend.health)
    web.run_app(app, host="127.0.0.1", port=int(port), print=None)


if __name__ == "__main__":
    main()
