"""Images wait for the memory of a GPU, and a batch that finds none runs image by image."""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from runners.images.memory import GpuMemory, pixels_at_once
from tests.support.image_models import write_image_model
from tests.support.image_program import LocalImageProgram
from tests.support.images import difference, diffusers_image, image_request

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model("stable-diffusion", tmp_path_factory.mktemp("images") / "tiny-sd")


def memory(*, allocated: int, peak: int, free: int = 1000) -> GpuMemory:
    return GpuMemory(total=2000, free=free, allocated=allocated, peak=peak)


def test_pixels_follow_from_what_one_image_needed() -> None:
    before = [memory(allocated=500, peak=500)]
    after = [memory(allocated=500, peak=600)]
    bound = functools.partial(pixels_at_once, pixels=50)
    assert bound(before, after, share=1.0) == 500
    assert bound(before, after, share=0.5) == 250  # 1000 in all, 500 of them taken by the weights
    assert bound(before, after, share=0.1) == 0
    idle = memory(allocated=0, peak=0)
    full = memory(allocated=500, peak=700, free=100)
    assert bound([*before, idle], [*after, idle], share=1.0) == 500
    assert bound(before * 2, [*after, full], share=1.0) == 25
    assert bound([], [], share=1.0) is None


def test_images_wait_for_the_memory_of_a_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an image's 32 by 32 pixels, two and a half fit."""
    memories = [[memory(allocated=0, peak=0)], [memory(allocated=0, peak=400)]]
    monkeypatch.setattr("runners.images.program.gpu_memories", lambda: memories.pop(0))
    program = LocalImageProgram(folder)
    assert "max_pixels: the GPU's free memory is enough for images of about 2560" in caplog.text
    requests = [image_request(seed=i) for i in range(3)]
    large = image_request(height=64, width=64)
    program.results(*requests, large)
    first: dict[str, int] = {}
    for index, event in enumerate(program.events):
        first.setdefault(event.request_id, index)
    ends = {e.request_id: i for i, e in enumerate(program.events) if e.image is not None}
    a, b, c = (request.request_id for request in requests)
    assert first[b] < ends[a] < first[c]
    assert max(ends[each] for each in (a, b, c)) < first[large.request_id]


def test_a_batch_that_does_not_fit_runs_image_by_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    freed: list[int] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append(live_activations()))
    program = LocalImageProgram(folder)
    original: Any = program.pipeline.unet.conv_in.forward

    class Activation(torch.Tensor):
        pass

    def live_activations() -> int:
        return sum(type(each) is Activation for each in gc.get_objects())

    def forward(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            kept = torch.ones(1).as_subclass(Activation)
            raise torch.OutOfMemoryError(f"no room for {len(kept)}")
        result: torch.Tensor = original(x)
        return result

    program.pipeline.unet.conv_in.forward = forward
    requests = [image_request(seed=i) for i in range(2)]
    images = program.generate(*requests)
    for each, image in zip(requests, images, strict=True):
        assert difference(image, diffusers_image(folder, each)) <= 1
    assert len(freed) >= 4  # once per step
    assert set(freed) == {0}
    assert "a batch of 2 model calls failed with OutOfMemoryError; each runs alone" in caplog.text
