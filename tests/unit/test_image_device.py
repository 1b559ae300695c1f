"""Image models on a device other than the CPU, as far as a fake one shows it."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
import torch.fx.experimental._config as fx_config
from diffusers import AutoencoderKLQwenImage, UNet2DConditionModel
from torch.overrides import TorchFunctionMode

from runners.config.files import load_setup_config
from runners.contracts.errors import ConfigError
from runners.contracts.images import ImageRequest
from runners.engines.images import load_program
from runners.images.pipeline import models_of
from runners.images.placement import INDUCTOR_CACHE, compile_denoiser, place, prepare_for_gpu
from runners.protocol.messages import Failed
from runners.rank.program import RankContext
from tests.support.fake_device import DEVICE, FakeDevice
from tests.support.image_models import FAMILIES, PROMPTS, write_image_model
from tests.support.image_program import LocalImageProgram
from tests.support.images import Pixels, difference, diffusers_image, image_request

STEPS = 6
NOISE = "torch_utils.py"
"""Where diffusers draws noise on the CPU and moves it."""
WAITS = {
    "ddpm": NOISE,
    "dpm2_ancestral": NOISE,
    "euler_ancestral": NOISE,
    "lcm": NOISE,
    "unipc": "scheduling_unipc_multistep.py",
}
"""The files whose lines make a step wait, by scheduler."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model("stable-diffusion", tmp_path_factory.mktemp("images") / "tiny-sd")


@pytest.fixture
def cudnn_flags() -> Iterator[None]:
    """Restores what a test changes."""
    with torch.backends.cudnn.flags():
        yield


def on_fake_device(folder: Path, **overrides: object) -> tuple[FakeDevice, LocalImageProgram]:
    device = FakeDevice()
    to_device = functools.partial(place, device=str(DEVICE), cpu_offload=None)
    return device, LocalImageProgram(
        folder, on_cpu=False, device=device, prepare=to_device, **overrides
    )


def waits_between_steps(
    device: FakeDevice, program: LocalImageProgram, requests: list[ImageRequest]
) -> list[str]:
    """What the host waits for while all images are between their first and their last step."""
    program.messages.clear()
    program.submit(*requests)
    waits: list[str] = []
    while any(program.result_of(request) is None for request in requests):
        done = min_step(program, requests)
        device.waits.clear()
        program.step()
        if done and min_step(program, requests) < steps_of(program):
            waits += device.waits
    return waits


def min_step(program: LocalImageProgram, requests: list[ImageRequest]) -> int:
    steps = {event.request_id: event.step for event in program.events}
    return min(steps.get(request.request_id, 0) for request in requests)


def image_of(program: LocalImageProgram, request: ImageRequest) -> Pixels:
    result = program.result_of(request)
    assert result is not None
    assert not isinstance(result, Failed)
    return result


def steps_of(program: LocalImageProgram) -> int:
    return max((event.steps for event in program.events), default=STEPS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_does_not_wait_for_the_device(family: str, tmp_path: Path) -> None:
    folder = write_image_model(family, tmp_path / family)
    device, program = on_fake_device(folder)
    requests = [
        image_request(prompt, seed=i, height=64, width=64, num_inference_steps=STEPS)
        for i, prompt in enumerate(PROMPTS[:2])
    ]
    assert waits_between_steps(device, program, requests) == []
    for each in requests:
        assert difference(image_of(program, each), diffusers_image(folder, each)) <= 1


def test_only_known_schedulers_wait_for_the_device(folder: Path) -> None:
    device, program = on_fake_device(folder)
    plain = LocalImageProgram(folder)
    for name in program.info.schedulers:
        requests = [
            image_request(seed=i, scheduler=name, num_inference_steps=STEPS) for i in range(2)
        ]
        waits = waits_between_steps(device, program, requests)
        assert {WAITS.get(name, "no file") in wait for wait in waits} <= {True}, (name, waits)
        for each, expected in zip(requests, plain.generate(*requests), strict=True):
            assert difference(image_of(program, each), expected) <= 1


def test_a_preview_is_read_from_the_device_only_when_it_is_due(folder: Path) -> None:
    device, program = on_fake_device(folder)
    request = image_request(num_inference_steps=STEPS, scheduler="ddim", previews=1)
    [read] = [wait for wait in waits_between_steps(device, program, [request]) if "numpy" in wait]
    assert "image_processor.py" in read
    assert sum(event.preview is not None for event in program.events) == 1


class AttentionCalls(TorchFunctionMode):
    """Records the attention of denoisers: whether it has what rules out a fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.masked: list[bool] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and not any(
            "transformers/models" in frame.filename or "autoencoders" in frame.filename
            for frame in traceback.extract_stack()
        ):
            query, key, value, *others = args or [kwargs[k] for k in ("query", "key", "value")]
            assert {tensor.stride(-1) for tensor in (query, key, value)} == {1}
            mask = others[0] if others else kwargs.get("attn_mask")
            assert kwargs.get("dropout_p", 0.0) == 0.0
            self.masked.append(mask is not None)
        return func(*args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_keep_to_attention_without_masks(family: str, tmp_path: Path) -> None:
    """Flash attention takes no mask. PixArt itself masks its prompts."""
    program = LocalImageProgram(write_image_model(family, tmp_path / family))
    with AttentionCalls() as calls:
        program.generate(*(image_request(prompt, scheduler=None) for prompt in PROMPTS))
    assert calls.masked
    assert any(calls.masked) == (family == "pixart")


def test_convolutions_of_a_gpu_are_channels_last(folder: Path, cudnn_flags: None) -> None:
    torch.backends.cudnn.benchmark = True
    program = LocalImageProgram(folder, prepare=prepare_for_gpu)
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)
    for model in (program.pipeline.unet, program.pipeline.vae):
        kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[-1] > 1]
        assert kernels
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    requests = [image_request(prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    for each, image in zip(requests, program.generate(*requests), strict=True):
        assert difference(image, diffusers_image(folder, each)) <= 1


def test_only_convolutions_of_images_are_channels_last(cudnn_flags: None) -> None:
    """The VAE of a video model has both kinds, and norms of four dimensions."""
    vae: Any = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    )
    pictures = torch.randn(1, 3, 1, 16, 16)
    with torch.no_grad():
        expected = vae.encode(pictures).latent_dist.mean
    before = {name: p.stride() for name, p in vae.named_parameters()}
    prepare_for_gpu(SimpleNamespace(vae=vae))
    modules = [m for m in vae.modules() if isinstance(m, torch.nn.Conv2d)]
    changed = {id(m.weight) for m in modules}
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in modules)
    others = {name: p for name, p in vae.named_parameters() if id(p) not in changed}
    assert {p.ndim for p in others.values()} >= {1, 4, 5}
    assert all(p.stride() == before[name] for name, p in others.items())
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(pictures).latent_dist.mean, expected)


def test_an_offloaded_model_makes_room_for_whichever_is_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images at different steps call the models in any order."""
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.empty_device_cache", lambda kind: None)
    device = FakeDevice()
    offload = functools.partial(place, device=str(DEVICE), cpu_offload="model")
    places: list[set[str]] = []

    def watch(name: str, pipeline: Any) -> None:
        target = pipeline.vae.decoder if name == "vae" else getattr(pipeline, name)
        original = target.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            models = models_of(pipeline).items()
            places.append(
                {name} ^ {k for k, m in models if next(m.parameters()).device.type == "meta"}
            )
            return original(*args, **kwargs)

        target.forward = forward

    def prepare(pipeline: Any) -> None:
        for name in models_of(pipeline):
            watch(name, pipeline)
        offload(pipeline)

    program = LocalImageProgram(
        folder, on_cpu=False, device=device, prepare=prepare, cpu_offload="model"
    )
    first, second = image_request(num_inference_steps=20), image_request(seed=1, previews=2)
    program.submit(first)
    for _ in range(3):
        program.step()
    [image] = program.generate(second)
    assert difference(image, diffusers_image(folder, second)) <= 1
    assert program.result_of(first) is None
    assert len(places) > 10
    assert not any(places)
    assert program.info.devices == ["cpu"]


def test_sequential_offloading_generates_the_same(folder: Path) -> None:
    def prepare(pipeline: Any) -> None:
        place(pipeline, "cpu", "sequential")
        for model in models_of(pipeline).values():
            for module in model.modules():
                hook: Any = getattr(module, "_hf_hook", None)
                for each in getattr(hook, "hooks", [hook]):
                    if getattr(each, "execution_device", None) is not None:
                        # diffusers adds an index, with which moves to the CPU are copies.
                        each.execution_device = torch.device("cpu")
        assert next(pipeline.unet.parameters()).is_meta

    program = LocalImageProgram(folder, prepare=prepare, cpu_offload="sequential")
    assert program.info.devices == ["cpu"]
    requests = [image_request(prompt, seed=i) for i, prompt in enumerate(PROMPTS[:2])]
    for each, image in zip(requests, program.generate(*requests), strict=True):
        assert difference(image, diffusers_image(folder, each)) <= 1


@pytest.mark.timeout(900)  # it compiles C++
def test_blocks_are_compiled_once_for_every_batch_and_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One start compiles, and the next one finds the result in the user's cache folder."""
    monkeypatch.setenv(INDUCTOR_CACHE, "")  # removed again after the test
    monkeypatch.delenv(INDUCTOR_CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counters = torch._dynamo.utils.counters
    requests = [
        image_request("a red circle"),
        image_request("two rings", guidance_scale=1.0),
        *(image_request("a blue square", seed=i, height=64, width=32) for i in range(3)),
    ]
    expected = [diffusers_image(folder, each) for each in requests]
    with (
        torch._dynamo.config.patch(recompile_limit=8),
        fx_config.patch(use_duck_shape=True),  # type: ignore[attr-defined]
        torch._inductor.config.patch(compile_threads=1),
    ):
        for found in (0, 2):
            torch._dynamo.reset()
            counters.clear()
            program = LocalImageProgram(folder, prepare=compile_denoiser, compile_denoiser=True)
            assert counters["stats"]["unique_graphs"] == 2  # for one row, and for several
            assert counters["inductor"]["fxgraph_cache_hit"] == found
            for image, other in zip(program.generate(*requests), expected, strict=True):
                assert difference(image, other) <= 1
            assert counters["stats"]["unique_graphs"] == 2
            assert not counters["graph_break"]
    torch._dynamo.reset()
    assert os.environ[INDUCTOR_CACHE] == str(tmp_path / "triptych" / "inductor")


def context(folder: Path, **overrides: object) -> RankContext:
    config, _ = load_setup_config(folder, name="tiny", overrides=overrides)
    return RankContext(config=config, rank=0, num_threads=1, work_dir=folder, emit=lambda _: None)


def test_a_denoiser_without_repeated_blocks_is_not_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet2DConditionModel, "_repeated_blocks", ["SomeOtherBlock"])
    with pytest.raises(ConfigError, match="UNet2DConditionModel has no repeated blocks") as caught:
        load_program(context(folder, compile_denoiser=True))
    assert caught.value.field == "compile_denoiser"


def test_a_pipeline_is_prepared_before_it_is_placed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offloading copies the weights as they are, and wraps what is compiled."""
    steps: list[tuple[object, ...]] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name in ("prepare_for_gpu", "compile_denoiser", "place", "image_program"):
        monkeypatch.setattr(
            f"runners.engines.images.{name}", lambda *args, name=name: steps.append((name, *args))
        )
    monkeypatch.setattr("runners.engines.images.load_pipeline", lambda *_, **__: "pipeline")
    load_program(given := context(folder, compile_denoiser=True, cpu_offload="model"))
    assert steps == [
        ("prepare_for_gpu", "pipeline"),
        ("compile_denoiser", "pipeline"),
        ("place", "pipeline", "cuda:0", "model"),
        ("image_program", given, "pipeline"),
    ]


@pytest.mark.parametrize("engine", ["accelerate", "deepspeed", "mii"])
def test_blocks_that_are_offloaded_layer_by_layer_are_not_compiled(
    folder: Path, engine: str
) -> None:
    options = {"engine": engine, "compile_denoiser": True}
    for offload in (None, "model"):
        load_setup_config(folder, name="tiny", overrides=options | {"cpu_offload": offload})
    with pytest.raises(ConfigError, match=r"compile_denoiser .* use cpu_offload model, or none"):
        load_setup_config(folder, name="tiny", overrides=options | {"cpu_offload": "sequential"})
