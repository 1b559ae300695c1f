"""Pictures of a program without its rank: every family's, in half precision, those refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor

from runners.contracts.images import MAX_PIXELS, ImageRequest
from runners.protocol.channel import MAX_FRAME_BYTES
from runners.protocol.messages import Events, Failed
from tests.support.image_models import KINDS, PROMPTS, add_safety_checker, write_image_model
from tests.support.imaging import Easels
from tests.support.painting import difference, pixels_of, plain, wish

SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small, more threads only wait for each other."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model("stable-diffusion", tmp_path_factory.mktemp("images") / "tiny-sd")


@pytest.fixture(scope="module")
def easels(folder: Path) -> Easels:
    return Easels(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_paints_as_diffusers_does(kind: str, tmp_path: Path) -> None:
    folder = write_image_model(kind, tmp_path / kind)
    easels = Easels(folder)
    info = easels.info
    assert info.architecture.lower().startswith(kind.replace("-", ""))
    assert info.scheduler in info.schedulers
    wishes = [wish(prompt, seed=7 + i, **SIZE) for i, prompt in enumerate(PROMPTS)]
    named = msgspec.structs.replace(
        wishes[0], request_id="named", scheduler=info.scheduler, previews=1
    )
    *pictures, again = easels.paint(*wishes, named)
    for each, picture in zip(wishes, pictures, strict=True):
        assert picture.std() > 1
        assert difference(picture, plain(folder, each)) <= 1
    assert difference(pictures[0], pictures[1]) > 1
    assert difference(pictures[0], again) <= 1
    [preview] = [event.preview for event in easels.events if event.preview is not None]
    assert pixels_of(preview).shape == again.shape


def test_half_precision_is_widened_for_the_decoding_alone(tmp_path: Path) -> None:
    """Stable Diffusion XL's VAE overflows in float16, so its pipeline decodes in float32."""
    folder = write_image_model("stable-diffusion-xl", tmp_path / "tiny-xl")
    easels = Easels(folder, dtype="float16")
    assert easels.info.dtype == "float16"
    wishes = [wish(prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    right = [plain(folder, each, dtype=torch.float16) for each in wishes]

    def all_alike(**fields: Any) -> None:
        alone, together = ([fresh(each, **fields) for each in wishes] for _ in range(2))
        pictures = [*(easels.paint(each)[0] for each in alone), *easels.paint(*together)]
        assert all(difference(*pair) <= 1 for pair in zip(pictures, right * 2, strict=True))

    all_alike()
    left = wish()
    easels.submit(left)
    while not any(e.request_id == left.request_id and e.step == e.steps for e in easels.events):
        easels.step()
    easels.abort(left)  # which waits for its decoding
    easels.step()
    assert easels.end_of(left) is None
    all_alike()
    all_alike(previews=2)
    assert sum(event.preview is not None for event in easels.events) == 4 * len(wishes)


def fresh(request: ImageRequest, **fields: Any) -> ImageRequest:
    return msgspec.structs.replace(request, request_id=wish().request_id, **fields)


def test_a_preview_that_fails_is_left_out(folder: Path) -> None:
    easels = Easels(folder)
    whole, fails = easels.pipeline.vae.decoder.forward, [True]

    def decode(*args: Any, **kwargs: Any) -> Any:
        if fails and fails.pop():
            raise torch.OutOfMemoryError("too much")
        return whole(*args, **kwargs)

    easels.pipeline.vae.decoder.forward = decode
    request = wish(previews=2)
    [picture] = easels.paint(request)
    assert difference(picture, plain(folder, request)) <= 1
    assert sum(event.preview is not None for event in easels.events) == 1


def test_what_waits_is_begun_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    easels = Easels(folder, max_batch_images=1)
    monkeypatch.setattr("runners.rank.inbox.IDLE_S", 3600.0)
    easels.paint(wish(), wish(), wish())


def test_the_bound_on_steps_holds_for_requests_that_name_none(folder: Path) -> None:
    easels = Easels(folder, max_inference_steps=3)
    easels.paint(wish(num_inference_steps=None, scheduler="ddim"))
    assert {event.steps for event in easels.events} == {3}


def test_a_size_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    easels = Easels(write_image_model("stable-diffusion-3", tmp_path / "tiny-sd3"))
    failed = easels.failure(wish(height=8, width=136))
    assert (failed.error, failed.field) == ("InvalidRequest", "width")
    assert "must be at most 128 pixels" in failed.reason
    assert easels.events == []
    [picture] = easels.paint(wish(height=8, width=128))
    assert picture.shape == (8, 128, 3)


def test_pixels_go_in_messages_of_their_own(easels: Easels) -> None:
    easels.messages.clear()
    easels.paint(*(wish(seed=i, previews=1) for i in range(3)))
    told: list[list[Any]] = [m.events for m in easels.messages if isinstance(m, Events)]
    with_pixels = [each for each in told if any(e.image or e.preview for e in each)]
    assert [len(each) for each in with_pixels] == [1] * 6
    assert [len(each) for each in told if each not in with_pixels] == [3] * 4
    assert MAX_PIXELS * 3 < MAX_FRAME_BYTES


def encoding(pipeline: Any) -> tuple[Any, str]:
    return pipeline, "encode_prompt"


def denoising(pipeline: Any) -> tuple[Any, str]:
    return pipeline.unet.conv_in, "forward"


def previewing(pipeline: Any) -> tuple[Any, str]:
    return pipeline.vae.decoder, "forward"


@pytest.mark.parametrize("place", [encoding, denoising, previewing])
def test_a_device_that_broke_ends_the_rank(
    folder: Path, place: Callable[[Any], tuple[Any, str]]
) -> None:
    easels = Easels(folder)
    broken(*place(easels.pipeline), torch.AcceleratorError("an illegal memory access"))
    with pytest.raises(torch.AcceleratorError):
        easels.outcomes(wish(previews=1), wish())


@pytest.mark.parametrize("place", [encoding, denoising])
def test_memory_that_does_not_suffice_ends_the_picture_alone(
    folder: Path, place: Callable[[Any], tuple[Any, str]]
) -> None:
    easels = Easels(folder)
    mend = broken(*place(easels.pipeline), torch.OutOfMemoryError("too much"))
    assert easels.failure(wish()).reason.endswith("OutOfMemoryError")
    mend()
    easels.paint(wish())


def broken(owner: Any, name: str, error: Exception) -> Callable[[], None]:
    """Have a function raise; what is returned mends it."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    setattr(owner, name, fail)
    return lambda: delattr(owner, name)


def test_attention_slicing_goes_head_by_head(folder: Path) -> None:
    easels = Easels(folder, attention_slicing=True)
    processors = easels.pipeline.unet.attn_processors.values()
    assert processors
    for each in processors:
        assert isinstance(each, SlicedAttnProcessor)
        assert each.slice_size == 1
    request = wish()
    assert difference(easels.paint(request)[0], plain(folder, request)) <= 1


@pytest.mark.parametrize("objects", [True, False])
def test_what_the_safety_checker_objects_to_is_withheld(
    tmp_path: Path, folder: Path, *, objects: bool
) -> None:
    checked = write_image_model("stable-diffusion", tmp_path / "checked")
    add_safety_checker(checked, objects=objects)
    request = wish(previews=2)
    easels = Easels(checked)
    [end] = easels.outcomes(request)
    assert not any(event.preview for event in easels.events)  # which nothing has checked
    if objects:
        assert isinstance(end, Failed)
        assert end.error == "ContentFiltered"
        assert "safety checker" in end.reason
    else:
        assert not isinstance(end, Failed)
        assert difference(end, plain(folder, request)) <= 1
