"""The image program without its rank: every family, 16-bit weights, failures, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor

from runners.contracts.errors import ConfigError
from runners.contracts.images import MAX_PIXELS, ImageRequest
from runners.images.pipeline import models_of
from runners.protocol.channel import MAX_FRAME_BYTES
from runners.protocol.messages import Events, Failed
from runners.rank.memory import Memory
from tests.support.image_models import FAMILIES, PROMPTS, add_safety_checker, write_image_model
from tests.support.image_program import LocalImageProgram
from tests.support.images import difference, diffusers_image, image_request, pixels_of

SIZE = {"height": 64, "width": 64}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model("stable-diffusion", tmp_path_factory.mktemp("images") / "tiny-sd")


@pytest.fixture(scope="module")
def program(folder: Path) -> LocalImageProgram:
    return LocalImageProgram(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_as_diffusers_does(family: str, tmp_path: Path) -> None:
    folder = write_image_model(family, tmp_path / family)
    program = LocalImageProgram(folder)
    info = program.info
    assert info.architecture.lower().startswith(family.replace("-", ""))
    assert info.scheduler in info.schedulers
    requests = [image_request(prompt, seed=7 + i, **SIZE) for i, prompt in enumerate(PROMPTS)]
    named = msgspec.structs.replace(
        requests[0], request_id="named", scheduler=info.scheduler, previews=1
    )
    *images, again = program.generate(*requests, named)
    for each, image in zip(requests, images, strict=True):
        assert image.std() > 1
        assert difference(image, diffusers_image(folder, each)) <= 1
    assert difference(images[0], images[1]) > 1
    assert difference(images[0], again) <= 1
    [preview] = [event.preview for event in program.events if event.preview is not None]
    assert pixels_of(preview).shape == again.shape


def test_float16_weights_are_computed_in_float32_on_a_cpu(tmp_path: Path) -> None:
    folder = write_image_model("stable-diffusion-xl", tmp_path / "tiny-xl")
    program = LocalImageProgram(folder, dtype="float16")
    assert program.info.dtype == "float16"
    assert {p.dtype for m in models_of(program.pipeline).values() for p in m.parameters()} == {
        torch.float32
    }
    rounded: Any = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    rounded.to(dtype=torch.float32).save_pretrained(tmp_path / "rounded")
    requests = [image_request(prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    expected = [diffusers_image(tmp_path / "rounded", each) for each in requests]
    images = program.generate(*requests)
    assert all(difference(*pair) <= 1 for pair in zip(images, expected, strict=True))


def test_half_precision_is_decoded_in_float32(tmp_path: Path) -> None:
    """Stable Diffusion XL's VAE overflows in float16, so its pipeline decodes in float32."""
    folder = write_image_model("stable-diffusion-xl", tmp_path / "tiny-xl")
    program = LocalImageProgram(folder, dtype="float16", on_cpu=False)
    assert program.info.dtype == "float16"
    requests = [image_request(prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    expected = [diffusers_image(folder, each, dtype=torch.float16) for each in requests]

    def all_alike(**fields: Any) -> None:
        alone, together = ([fresh(each, **fields) for each in requests] for _ in range(2))
        images = [*(program.generate(each)[0] for each in alone), *program.generate(*together)]
        assert all(difference(*pair) <= 1 for pair in zip(images, expected * 2, strict=True))

    all_alike()
    aborted = image_request()
    program.submit(aborted)
    while not any(e.request_id == aborted.request_id and e.step == e.steps for e in program.events):
        program.step()
    program.abort(aborted)  # whose decoding is pending
    program.step()
    assert program.result_of(aborted) is None
    all_alike()
    all_alike(previews=2)
    assert sum(event.preview is not None for event in program.events) == 4 * len(requests)


def fresh(request: ImageRequest, **fields: Any) -> ImageRequest:
    return msgspec.structs.replace(request, request_id=image_request().request_id, **fields)


def test_a_preview_that_fails_is_left_out(folder: Path) -> None:
    program = LocalImageProgram(folder)
    original, fails = program.pipeline.vae.decoder.forward, [True]

    def decode(*args: Any, **kwargs: Any) -> Any:
        if fails and fails.pop():
            raise torch.OutOfMemoryError("too much")
        return original(*args, **kwargs)

    program.pipeline.vae.decoder.forward = decode
    request = image_request(previews=2)
    [image] = program.generate(request)
    assert difference(image, diffusers_image(folder, request)) <= 1
    assert sum(event.preview is not None for event in program.events) == 1


def test_a_waiting_request_starts_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = LocalImageProgram(folder, max_batch_images=1)
    monkeypatch.setattr("runners.rank.inbox.IDLE_S", 3600.0)
    program.generate(image_request(), image_request(), image_request())


def test_a_batch_that_the_machine_cannot_hold_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(total=3 * 2**20, free=3 * 2**20)
    monkeypatch.setattr("runners.images.program.machine_memory", lambda: memory)
    fits: dict[str, Any] = {"max_batch_images": 4, "max_pixels": 2**16}
    assert LocalImageProgram(folder, **fits).info.max_pixels == 2**16
    with pytest.raises(ConfigError, match="GiB of memory on cpu") as caught:
        LocalImageProgram(folder, **fits | {"max_batch_images": 5})
    assert caught.value.field == "max_batch_images"


def test_the_bound_on_steps_holds_for_requests_that_name_none(folder: Path) -> None:
    program = LocalImageProgram(folder, max_inference_steps=3)
    program.generate(image_request(num_inference_steps=None, scheduler="ddim"))
    assert {event.steps for event in program.events} == {3}


def test_a_size_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    program = LocalImageProgram(write_image_model("stable-diffusion-3", tmp_path / "tiny-sd3"))
    failed = program.failure(image_request(height=8, width=136))
    assert (failed.error, failed.field) == ("InvalidRequest", "width")
    assert "must be at most 128 pixels" in failed.reason
    assert program.events == []
    [image] = program.generate(image_request(height=8, width=128))
    assert image.shape == (8, 128, 3)


def test_pixels_are_sent_in_separate_messages(program: LocalImageProgram) -> None:
    program.messages.clear()
    program.generate(*(image_request(seed=i, previews=1) for i in range(3)))
    batches: list[list[Any]] = [m.events for m in program.messages if isinstance(m, Events)]
    with_pixels = [each for each in batches if any(e.image or e.preview for e in each)]
    assert [len(each) for each in with_pixels] == [1] * 6
    assert [len(each) for each in batches if each not in with_pixels] == [3] * 4
    assert MAX_PIXELS * 3 < MAX_FRAME_BYTES


def encoding(pipeline: Any) -> tuple[Any, str]:
    return pipeline, "encode_prompt"


def denoising(pipeline: Any) -> tuple[Any, str]:
    return pipeline.unet.conv_in, "forward"


def previewing(pipeline: Any) -> tuple[Any, str]:
    return pipeline.vae.decoder, "forward"


@pytest.mark.parametrize("target", [encoding, denoising, previewing])
def test_a_broken_device_ends_the_rank(
    folder: Path, target: Callable[[Any], tuple[Any, str]]
) -> None:
    program = LocalImageProgram(folder)
    broken(*target(program.pipeline), torch.AcceleratorError("an illegal memory access"))
    with pytest.raises(torch.AcceleratorError):
        program.results(image_request(previews=1), image_request())


@pytest.mark.parametrize("target", [encoding, denoising])
def test_lack_of_memory_ends_only_one_image(
    folder: Path, target: Callable[[Any], tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = LocalImageProgram(folder)
    freed: list[bool] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append(True))
    restore = broken(*target(program.pipeline), torch.OutOfMemoryError("too much"))
    failed = program.failure(image_request(height=64))
    assert (failed.error, failed.field) == ("EngineFailure", None)
    assert "memory is not enough for this image, of 32 by 64 pixels" in failed.reason
    assert freed
    restore()
    program.generate(image_request())


def broken(owner: Any, name: str, error: Exception) -> Callable[[], None]:
    """Have a function raise; the returned function restores it."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    setattr(owner, name, fail)
    return lambda: delattr(owner, name)


def test_attention_slicing_goes_head_by_head(folder: Path) -> None:
    program = LocalImageProgram(folder, attention_slicing=True)
    processors = program.pipeline.unet.attn_processors.values()
    assert processors
    for each in processors:
        assert isinstance(each, SlicedAttnProcessor)
        assert each.slice_size == 1
    request = image_request()
    assert difference(program.generate(request)[0], diffusers_image(folder, request)) <= 1


@pytest.mark.parametrize("rejects", [True, False])
def test_an_image_that_the_safety_checker_rejects_is_not_sent(
    tmp_path: Path, folder: Path, *, rejects: bool
) -> None:
    checked = write_image_model("stable-diffusion", tmp_path / "checked")
    add_safety_checker(checked, rejects=rejects)
    request = image_request(previews=2)
    program = LocalImageProgram(checked)
    [result] = program.results(request)
    assert not any(event.preview for event in program.events)  # the checker does not see previews
    if rejects:
        assert isinstance(result, Failed)
        assert result.error == "ContentFiltered"
        assert "safety checker" in result.reason
    else:
        assert not isinstance(result, Failed)
        assert difference(result, diffusers_image(folder, request)) <= 1
