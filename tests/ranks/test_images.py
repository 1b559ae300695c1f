"""Images of real rank processes: equal to those of diffusers, alone and batched, on all engines;
steps, cancellation, refusals, and ranks that die."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runners.config.base import ImageConfig
from runners.config.files import load_setup_config
from runners.contracts.errors import ConfigError, InvalidRequest, RunnerUnavailable
from runners.contracts.images import ImageRequest, ImageRunner
from tests.support.generating import failed_start, wait_ready
from tests.support.image_models import PROMPTS, write_image_model
from tests.support.images import (
    difference,
    diffusers_image,
    events_of,
    generate,
    image_request,
    pixels_of,
    serving_images,
)
from tests.support.processes import alive, own_ranks

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("forked_ranks")]

# Other prompts, seeds, guidance, schedulers and numbers of steps, all of which fit into one batch.
MIXED: tuple[dict[str, Any], ...] = (
    {"prompt": PROMPTS[0], "seed": 1},
    {"prompt": PROMPTS[1], "seed": 2, "guidance_scale": 3.0, "num_inference_steps": 7},
    {"prompt": PROMPTS[2], "seed": 3, "guidance_scale": 1.0},
    {"prompt": PROMPTS[0], "seed": 4, "negative_prompt": "blue", "num_inference_steps": 5},
    {"prompt": PROMPTS[1], "seed": 5, "scheduler": "euler_ancestral"},
    {"prompt": PROMPTS[2], "seed": 6, "scheduler": "heun", "previews": 2},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model("stable-diffusion", tmp_path_factory.mktemp("images") / "tiny-sd")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(folder: Path, forked_ranks: None) -> AsyncIterator[ImageRunner]:
    async with serving_images(folder) as ready:
        yield ready


async def wait_for_load(runner: ImageRunner, *, running: int = 0, waiting: int = 0) -> None:
    """Until `health()` has these counts, which the ranks report once a second."""
    async with asyncio.timeout(5):
        while (runner.health().running, runner.health().waiting) != (running, waiting):
            await asyncio.sleep(0.01)


async def test_a_transformer_generates_as_diffusers_does(tmp_path: Path) -> None:
    folder = write_image_model("flux", tmp_path / "tiny-flux")
    requests = [image_request(prompt, seed=7 + i, height=64) for i, prompt in enumerate(PROMPTS)]
    async with serving_images(folder) as runner:
        images = await asyncio.gather(*(generate(runner, each) for each in requests))
    for each, image in zip(requests, images, strict=True):
        assert difference(image, diffusers_image(folder, each)) <= 1


@pytest.mark.parametrize(
    "engine",
    [
        {"engine": "accelerate", "attention_slicing": True, "vae_slicing": True},
        {"engine": "deepspeed", "tensor_parallel": 2},
        {"engine": "mii"},
    ],
    ids=lambda engine: engine["engine"],
)
async def test_a_seed_gives_the_same_pixels_alone_together_and_on_every_engine(
    folder: Path, engine: dict[str, object]
) -> None:
    expected = [diffusers_image(folder, image_request(**fields)) for fields in MIXED]
    async with serving_images(folder, **engine) as runner:
        alone = [await generate(runner, image_request(**fields)) for fields in MIXED]
        batched = await asyncio.gather(
            *(generate(runner, image_request(**fields)) for fields in MIXED)
        )
    for one, other, right in zip(alone, batched, expected, strict=True):
        assert difference(one, right) <= 1
        assert difference(other, right) <= 1


async def test_steps_and_previews_are_sent(runner: ImageRunner) -> None:
    events = await events_of(
        runner, image_request(num_inference_steps=6, previews=2, scheduler="ddim")
    )
    assert [(e.step, e.steps) for e in events] == [(i, 6) for i in (1, 2, 3, 4, 5, 6, 6)]
    assert [e.step for e in events if e.preview is not None] == [2, 4]
    last = events[-1].image
    assert last is not None
    previews = [pixels_of(e.preview) for e in events if e.preview is not None]
    assert all(p.shape == pixels_of(last).shape and p.std() > 1 for p in previews)


async def test_requests_join_at_any_step_and_share_the_rest(runner: ImageRunner) -> None:
    order: list[str] = []

    async def watch(request: ImageRequest) -> None:
        stream = await runner.submit(request)
        async for event in stream:
            order.append(f"{request.request_id}:{event.step}")

    long, short = image_request(num_inference_steps=60), image_request(num_inference_steps=5)
    first = asyncio.create_task(watch(long))
    while len(order) < 3:
        await asyncio.sleep(0.001)
    await watch(short)
    began, ended = order.index(f"{short.request_id}:1"), order.index(f"{short.request_id}:5")
    between = [each for each in order[began:ended] if each.startswith(f"{long.request_id}:")]
    # The short one did not wait for the long one's end, nor the long one for the short one's.
    assert 3 <= len(between) <= 5
    assert not first.done()
    await first


async def test_leaving_ends_the_generation_within_a_step(runner: ImageRunner) -> None:
    stream = await runner.submit(image_request(num_inference_steps=200))
    async for event in stream:
        if event.step == 2:
            break
    await stream.aclose()
    # The next image is alone from its first step on: nothing else arrives from the rank.
    [rank] = own_ranks()
    await events_of(runner, image_request(num_inference_steps=2))
    before = rank.cpu_times().user
    await asyncio.sleep(1.0)
    assert rank.cpu_times().user - before < 0.3
    await wait_for_load(runner)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"height": 10_000, "width": 10_000}, "height", "at most 4096 pixels"),
        ({"height": 40, "width": 44}, "width", "multiple of 8"),
        ({"num_inference_steps": 0}, "num_inference_steps", "from 1 to 200"),
        ({"num_inference_steps": 201}, "num_inference_steps", "from 1 to 200"),
        ({"scheduler": "steam"}, "scheduler", "euler"),
        ({"scheduler": "flow_match_euler"}, "scheduler", "fit this model"),
    ],
)
async def test_what_cannot_be_generated_is_refused(
    runner: ImageRunner, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        await runner.submit(image_request(**fields))
    assert caught.value.field == param
    await wait_for_load(runner)


async def test_a_killed_rank_fails_its_images_and_is_restarted(folder: Path) -> None:
    before = own_ranks()
    # So many steps that they last longer than the ranks take to report them.
    steps = 900
    overrides: dict[str, object] = {
        "engine": "deepspeed",
        "tensor_parallel": 2,
        "max_inference_steps": steps,
    }
    async with serving_images(folder, **overrides) as runner:
        ranks = [p for p in own_ranks() if p not in before]
        requests = [image_request(num_inference_steps=steps) for _ in range(4)]
        streams = [await runner.submit(request) for request in requests]
        for stream in streams:
            await anext(aiter(stream))
        await wait_for_load(runner, running=4)
        assert len(ranks) == 2
        os.kill(ranks[1].pid, signal.SIGKILL)
        async with asyncio.timeout(2):
            for stream in streams:
                with pytest.raises(RunnerUnavailable, match="went down"):
                    async for _ in stream:
                        pass
        await wait_ready(runner)
        assert runner.health().restarts == 1
        assert (await generate(runner, image_request())).shape == (32, 32, 3)
        ranks += [p for p in own_ranks() if p not in before]
    assert alive(ranks) == []


async def test_a_start_that_cannot_succeed_says_why(folder: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(folder, tmp_path / "odd")
    (odd / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    health = await failed_start(odd)
    assert "odd cannot be loaded" in health.detail


async def test_an_image_model_is_no_text_model(folder: Path) -> None:
    config, _ = load_setup_config(folder, name="tiny-sd")
    assert isinstance(config, ImageConfig)
    with pytest.raises(ConfigError):
        load_setup_config(folder, name="tiny-sd", overrides={"max_batch_images": 0})
