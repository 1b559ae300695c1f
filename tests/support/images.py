"""Drives an ImageRunner in tests, and generates the images it is compared to with diffusers."""

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
async def serving_images(folder: Path, **overrides: object) -> AsyncIterator[ImageRunner]:
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


def image_request(prompt: str = "a red circle", **fields: Any) -> ImageRequest:
    """A request with a fresh id."""
    return ImageRequest(
        request_id=f"test-{next(_ids)}", prompt=prompt, **{"num_inference_steps": 4} | fields
    )


async def events_of(runner: ImageRunner, request: ImageRequest) -> list[ImageEvent]:
    """All events of one image."""
    stream = await runner.submit(request)
    try:
        return [event async for event in stream]
    finally:
        await stream.aclose()


async def generate(runner: ImageRunner, request: ImageRequest) -> Pixels:
    """The image, of shape (height, width, 3)."""
    image = (await events_of(runner, request))[-1].image
    assert image is not None
    return pixels_of(image)


def pixels_of(image: RawImage) -> Pixels:
    """An image, of shape (height, width, 3)."""
    return np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)


def difference(one: Pixels, other: Pixels) -> int:
    """The largest difference between values of two images, from 0 to 255."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def diffusers_image(folder: Path, request: ImageRequest, **options: object) -> Pixels:
    """The image that diffusers alone generates; `options` load the pipeline."""
    with warnings.catch_warnings(action="ignore"):  # of diffusers
        return _diffusers_image(folder, request, options)


def _diffusers_image(folder: Path, request: ImageRequest, loading: dict[str, object]) -> Pixels:
    import diffusers
    import torch

    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, **loading)
    pipeline.set_progress_bar_config(disable=True)
    if request.scheduler is not None:
        scheduler = getattr(diffusers, SCHEDULERS[request.scheduler])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    options = {
        name: value
        for name in ("height", "width", "guidance_scale", "negative_prompt")
        if (value := getattr(request, name)) is not None
    }
    image = pipeline(
        request.prompt,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed),
        **options,
    ).images[0]
    return np.asarray(image)
