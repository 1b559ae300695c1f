"""Driving an ImageRunner in tests, and what its pictures must equal."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runners import create_runner
from runners.config.files import load_setup_config
from runners.contracts.images import ImageEvent, ImageRequest, ImageRunner, RawImage
from tests.support.generating import wait_ready

SCHEDULERS = {
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
_ids = itertools.count()
Pixels = NDArray[np.uint8]


@asynccontextmanager
async def painting(folder: Path, **overrides: object) -> AsyncIterator[ImageRunner]:
    """A started and ready runner for an image model's folder."""
    config, _ = load_setup_config(
        folder, name=folder.name, overrides={"num_threads": 1} | overrides
    )
    runner = create_runner(config)
    await runner.start()
    try:
        await wait_ready(runner)
        yield runner
    finally:
        await runner.stop()


def wish(prompt: str = "a red circle", **fields: Any) -> ImageRequest:
    """A request with a fresh id."""
    return ImageRequest(
        request_id=f"test-{next(_ids)}", prompt=prompt, **{"num_inference_steps": 4} | fields
    )


async def events_of(runner: ImageRunner, request: ImageRequest) -> list[ImageEvent]:
    """All events of one picture."""
    stream = await runner.submit(request)
    try:
        return [event async for event in stream]
    finally:
        await stream.aclose()


async def paint(runner: ImageRunner, request: ImageRequest) -> Pixels:
    """The picture as (height, width, 3)."""
    picture = (await events_of(runner, request))[-1].image
    assert picture is not None
    return pixels_of(picture)


def pixels_of(picture: RawImage) -> Pixels:
    """A picture as (height, width, 3)."""
    return np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width, 3)


def difference(one: Pixels, other: Pixels) -> int:
    """The largest difference of two pictures' values, of 255."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def plain(folder: Path, request: ImageRequest, **options: object) -> Pixels:
    """The picture that diffusers alone paints, with nothing of ours; `options` to load with."""
    with warnings.catch_warnings(action="ignore"):  # of diffusers' own
        return _plain(folder, request, options)


def _plain(folder: Path, request: ImageRequest, options: dict[str, object]) -> Pixels:
    import diffusers
    import torch

    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    if request.scheduler is not None:
        scheduler = getattr(diffusers, SCHEDULERS[request.scheduler])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    wishes = {
        name: value
        for name in ("height", "width", "guidance_scale", "negative_prompt")
        if (value := getattr(request, name)) is not None
    }
    image = pipeline(
        request.prompt,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed),
        **wishes,
    ).images[0]
    return np.asarray(image)
