"""The clients of the soak test: what they send, and what the right answer is."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

PROMPTS = (
    "Once upon a time in Porto Lume, Fenna the fox",
    "The lighthouse of Porto Lume",
    "hello",
    "In the morning the baker",
    "A" * 200,
    "one two three four five six seven eight " * 6,
)
IMAGES = ("a red circle", "a blue square", "a green ring", "two crosses")
TOKENS = 96
"""Greedy tokens of each reference; a request asks for some of them."""
STEPS = 4
"""Denoising steps of an image."""
TIMEOUT_S = 90.0
"""An answer that takes longer counts as hung; the server's own limit is 60 s."""
CALM_S = 20.0
"""A request that overlaps with the `CALM_S` after a kill, or with the restart, may fail."""


class ServerError(Exception):
    """The server ended a request with an error."""


@dataclass(frozen=True)
class References:
    """Right answers, computed without the server's batching."""

    tokens: dict[str, list[int]]
    """Per prompt, from `model.generate(do_sample=False)`."""
    texts: dict[str, list[str]]
    """Per prompt, the text of the first n tokens, by n."""
    pixels: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """Per image, uint8 `[height, width, 3]`, from the server while it does nothing else."""


def text_references(folder: Path) -> References:
    """References of a text model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens: dict[str, list[int]] = {}
    texts: dict[str, list[str]] = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        full = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
        tokens[prompt] = ids = full[0, inputs.input_ids.shape[1] :].tolist()
        texts[prompt] = [
            str(tokenizer.decode(ids[:n], skip_special_tokens=True)) for n in range(TOKENS)
        ]
    return References(tokens, texts)


class Clients:
    """Clients that send one random request after another until `stop` is set."""

    def __init__(self, url: str, references: References, seed: int) -> None:
        self.stop = asyncio.Event()
        self.counts: Counter[str] = Counter()
        """By outcome: right, left, failed, wrong, hung, unexpected."""
        self.problems: list[str] = []
        self._url = url
        self._references = references
        self._random = random.Random(seed)  # noqa: S311 - not cryptographic
        self._disturbed_until = 0.0

    def disturb(self) -> None:
        """From now on, and for a while after `calm`, requests may fail."""
        self._disturbed_until = float("inf")

    def calm(self) -> None:
        """The server is ready again."""
        self._disturbed_until = time.monotonic() + CALM_S

    async def run(self, count: int) -> None:
        """Run `count` clients until `stop`."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(self._client(session) for _ in range(count)))

    async def image(self, session: aiohttp.ClientSession, prompt: str) -> np.ndarray[Any, Any]:
        """The pixels of one image."""
        body = {"prompt": prompt, "seed": 7, "num_inference_steps": STEPS}
        content = await self._post(session, "/generate_image", body)
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        behaviours: list[tuple[Callable[[aiohttp.ClientSession], Awaitable[str]], int]] = [
            (self._unary, 4),
            (self._stream, 4),
            (self._several, 2),
            (self._image, 1),
            (self._leave, 3),
            (self._mistake, 1),
        ]
        kinds, weights = zip(*behaviours, strict=True)
        while not self.stop.is_set():
            [behaviour] = self._random.choices(kinds, weights)
            outcome = await self._outcome(behaviour, session)
            self.counts[outcome] += 1
            if outcome == "failed":
                await asyncio.sleep(0.5)

    async def _outcome(
        self,
        behaviour: Callable[[aiohttp.ClientSession], Awaitable[str]],
        session: aiohttp.ClientSession,
    ) -> str:
        began = time.monotonic()
        try:
            outcome = await behaviour(session)
        except TimeoutError:
            outcome, error = "hung", "no end"
        except (ServerError, aiohttp.ClientError) as caught:
            outcome = "failed" if began < self._disturbed_until else "unexpected"
            error = repr(caught)
        else:
            error = "another answer"
        if outcome in ("hung", "unexpected", "wrong"):
            name = getattr(behaviour, "__name__", "")
            self.problems.append(f"{outcome}: {name}: {error[:300]}")
        return outcome

    def _ask(self) -> tuple[str, int]:
        return self._random.choice(PROMPTS), self._random.randint(1, TOKENS - 1)

    async def _post(self, session: aiohttp.ClientSession, path: str, body: object) -> bytes:
        async with session.post(self._url + path, json=body) as response:
            content = await response.read()
            if response.status != 200:
                raise ServerError(f"{response.status}: {content[:200]!r}")
            return content

    async def _unary(self, session: aiohttp.ClientSession) -> str:
        prompt, count = self._ask()
        body = {"prompt": prompt, "max_new_tokens": count, "temperature": 0, "ignore_eos": True}
        [output] = json.loads(await self._post(session, "/generate", body))["outputs"]
        return _verdict(output["generated_text"] == self._references.texts[prompt][count])

    async def _several(self, session: aiohttp.ClientSession) -> str:
        prompts, count = list(self._random.sample(PROMPTS, 3)), self._random.randint(1, 32)
        body = {"prompt": prompts, "max_tokens": count, "temperature": 0, "n": 2}
        body["ignore_eos"] = True
        choices = json.loads(await self._post(session, "/v1/completions", body))["choices"]
        expected = [self._references.texts[p][count] for p in prompts for _ in range(2)]
        return _verdict([choice["text"] for choice in choices] == expected)

    async def _stream(self, session: aiohttp.ClientSession) -> str:
        prompt, count = self._ask()
        ids = [token async for token in self._tokens(session, prompt, count)]
        return _verdict(ids == self._references.tokens[prompt][:count])

    async def _leave(self, session: aiohttp.ClientSession) -> str:
        prompt, count = self._ask()
        if self._random.random() < 0.5:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._random.random()):
                    await self._unary(session)
            return "left"
        stream = self._tokens(session, prompt, TOKENS)
        ids = []
        async for token in stream:
            ids.append(token)
            if len(ids) >= count // 4 + 1:
                break
        await stream.aclose()
        right = ids == self._references.tokens[prompt][: len(ids)]
        return "left" if right else "wrong"

    async def _tokens(self, session: aiohttp.ClientSession, prompt: str, count: int) -> Any:
        body = {"prompt": prompt, "max_new_tokens": count, "temperature": 0, "ignore_eos": True}
        async with session.post(f"{self._url}/generate_stream", json=body) as response:
            if response.status != 200:
                raise ServerError(f"{response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    if "error" in event:
                        raise ServerError(str(event["error"])[:200])
                    for token in event.get("token_ids", ()):
                        yield token

    async def _image(self, session: aiohttp.ClientSession) -> str:
        prompt = self._random.choice(IMAGES)
        pixels = (await self.image(session, prompt)).astype(int)
        difference = np.abs(pixels - self._references.pixels[prompt]).max()
        return _verdict(bool(difference <= 1))

    async def _mistake(self, session: aiohttp.ClientSession) -> str:
        body = {"prompt": "hello", "max_new_tokens": -1}
        async with session.post(f"{self._url}/generate", json=body) as response:
            return _verdict(response.status == 400)


def _verdict(right: bool) -> str:
    return "right" if right else "wrong"
