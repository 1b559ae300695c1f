"""ImageProgram: the program of a rank with an image model.

It takes requests from the host, runs denoising steps and emits events. Made by
`runners.engines.images` and called by the rank's loop (`runners.rank.worker`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from typing_extensions import override

from runners.config.base import ImageConfig
from runners.contracts.errors import (
    ConfigError,
    ContentFiltered,
    EngineFailure,
    InvalidRequest,
    TriptychError,
    first_line,
)
from runners.contracts.images import MAX_PIXELS, ImageEvent, ImageModelInfo, ImageRequest
from runners.contracts.runner import RunnerState
from runners.hf.dtypes import weight_dtype
from runners.images.executor import BatchExecutor, batched
from runners.images.generator import ImageGenerator
from runners.images.memory import (
    GpuMemory,
    gpu_memories,
    pixels_at_once,
    reset_peaks,
    warn_if_too_large,
)
from runners.images.pipeline import denoiser_of, models_of, parameters_of
from runners.images.schedulers import Schedulers
from runners.protocol.messages import (
    Abort,
    Accepted,
    Events,
    HostMessage,
    RankMessage,
    Submit,
    request_failed,
)
from runners.rank.inbox import Inbox
from runners.rank.memory import check_fits, gpu_memory_share, machine_memory
from runners.rank.program import Occupancy, RankContext, RankProgram

logger = logging.getLogger("triptych.images")


class ImageProgram(RankProgram):
    """Generates the images of a text-to-image model, up to `max_batch` at a time.

    `max_running_pixels`: what fits into the memory of the GPU at a time, as height times width of
    all images; one image is started in any case. None: no limit.
    """

    def __init__(
        self,
        *,
        info: ImageModelInfo,
        generator: ImageGenerator,
        max_batch: int,
        emit: Callable[[RankMessage], None],
        max_running_pixels: int | None = None,
    ) -> None:
        self._info = info
        self._generator = generator
        self._max_batch = max_batch
        self._max_running_pixels = max_running_pixels
        self._pixels: dict[str, int] = {}
        self._emit = emit
        self._executor = BatchExecutor()
        self._waiting: deque[ImageRequest] = deque()
        self._inbox = Inbox[ImageRequest | Abort]()
        self._events: list[ImageEvent] = []

    @property
    @override
    def info(self) -> ImageModelInfo:
        return self._info

    @override
    def receive(self, message: HostMessage) -> None:
        match message:
            case Submit(ImageRequest() as request):
                try:
                    request = self.info.checked(request)
                except InvalidRequest as error:
                    self._emit(request_failed(request.request_id, error))
                    return
                self._emit(Accepted(request.request_id))
                self._inbox.put(request)
            case Abort():
                self._inbox.put(message)
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    @override
    def step(self) -> None:
        for item in self._inbox.take(wait=not (len(self._executor) or self._waiting)):
            if isinstance(item, ImageRequest):
                self._waiting.append(item)
            else:
                self._abort(item.request_id)
        # This is a setting of the thread, and the rank's loop runs every step in the same one.
        torch.set_grad_enabled(False)
        while self._waiting and self._has_room(self._waiting[0]):
            self._start(self._waiting.popleft())
        self._executor.step()
        self._emit_events()

    @override
    def occupancy(self) -> Occupancy:
        return Occupancy(running=len(self._executor), waiting=len(self._waiting))

    def _abort(self, request_id: str) -> None:
        self._executor.abort(request_id)
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)

    def _has_room(self, request: ImageRequest) -> bool:
        """Whether an image can be started next to those that are running."""
        if len(self._executor) >= self._max_batch:
            return False
        if self._max_running_pixels is None or not len(self._executor):
            return True
        self._pixels = {name: self._pixels[name] for name in self._executor}
        return sum(self._pixels.values()) + _pixels(request) <= self._max_running_pixels

    def _emit_events(self) -> None:
        """Emit the events of the step in order, those with pixels in separate messages."""
        for has_pixels, group in itertools.groupby(self._events, key=_has_pixels):
            events = list(group)
            size = 1 if has_pixels else len(events)
            for start in range(0, len(events), size):
                self._emit(Events([*events[start : start + size]]))
        self._events = []

    def _start(self, request: ImageRequest) -> None:
        def run() -> None:
            lacks_memory = False
            try:
                self._generator.generate(request, lambda event: self._events.append(event))
            except torch.AcceleratorError:  # the device computes nothing afterwards
                raise
            except Exception as error:  # one image's error must not end the rank
                lacks_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
                self._report(request, error)
            if lacks_memory:  # and the error, whose traceback has the image's tensors, is gone
                torch.cuda.empty_cache()

        self._pixels[request.request_id] = _pixels(request)
        self._executor.start(request.request_id, run)

    def _report(self, request: ImageRequest, error: Exception) -> None:
        if not isinstance(error, TriptychError):
            logger.error(
                "an image failed with %s",
                type(error).__name__,
                extra={"request_id": request.request_id},
            )
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            error = EngineFailure(
                "the device's memory is not enough for this image, of "
                f"{request.width} by {request.height} pixels; a smaller one needs less"
            )
        self._emit(request_failed(request.request_id, error))


def image_program(context: RankContext, pipeline: Any) -> ImageProgram:
    """Make the program of a placed pipeline and generate a first image. Raises: ConfigError."""
    config = context.config
    assert isinstance(config, ImageConfig)  # noqa: S101 - `runners.engines.images` checked it
    if config.attention_slicing:
        # Head by head; the default would be two slices of half the heads.
        pipeline.enable_attention_slicing("max")
    vae = getattr(pipeline, "vae", None)
    if vae is not None and config.vae_slicing:
        vae.enable_slicing()
    if vae is not None and config.vae_tiling:
        vae.enable_tiling()
    schedulers = Schedulers(pipeline.scheduler)
    info = _model_info(config, pipeline, schedulers)
    # The decoded images alone, of 3 colours in float32; ranks share the memory of their machine.
    image_bytes = 12 * info.max_pixels * config.local_world_size
    check_fits("max_batch_images", config.max_batch_images, image_bytes, machine_memory())
    _batch_model_calls(pipeline)
    context.progress(RunnerState.WARMUP, "generating a first image")
    generator = ImageGenerator(pipeline, schedulers, _defaults(config))
    before = gpu_memories()
    reset_peaks()
    _warm_up(info.architecture, generator, _first_image(info))
    bound = _max_running_pixels(config, info, before)
    if config.compile_denoiser:
        context.progress(RunnerState.WARMUP, "compiling the denoiser")
        # Torch compiles a block for one row and for several. Without guidance, an image has one.
        _warm_up(info.architecture, generator, _first_image(info, guidance_scale=1.0))
        _warm_up(
            info.architecture,
            generator,
            _first_image(info),
            _first_image(info, request_id="warm-up-2"),
        )
    return ImageProgram(
        info=info,
        generator=generator,
        max_batch=config.max_batch_images,
        emit=context.emit,
        max_running_pixels=bound,
    )


def _max_running_pixels(
    config: ImageConfig, info: ImageModelInfo, before: list[GpuMemory]
) -> int | None:
    """The pixels that fit on the GPUs at a time; None if that is not known.

    `before`: the memory before the first image, which has just been generated.
    """
    if config.cpu_offload is not None:
        return None  # the peak is mostly that of the weights, which images share
    share = gpu_memory_share(config)
    bound = pixels_at_once(before, gpu_memories(), pixels=info.height * info.width, share=share)
    if bound is not None:
        warn_if_too_large(info.max_pixels, bound)
    return bound


def _defaults(config: ImageConfig) -> dict[str, object]:
    """The config's defaults for a request, with no more steps than it allows."""
    defaults: dict[str, object] = {}
    if config.num_inference_steps is not None:
        defaults["num_inference_steps"] = min(
            config.num_inference_steps, config.max_inference_steps
        )
    if config.guidance_scale is not None:
        defaults["guidance_scale"] = config.guidance_scale
    return defaults


def _batch_model_calls(pipeline: Any) -> None:
    """Wrap the calls of the pipeline's models by `batched`."""
    for name, model in models_of(pipeline).items():
        if name != "safety_checker":  # it returns a list with an item per row, not a tensor
            model.forward = batched(model.forward)
        if callable(decode := getattr(model, "decode", None)):
            # AutoencoderKL accepts a random generator for decoding but does not use it.
            unused = {"generator"} if isinstance(model, AutoencoderKL) else ()
            model.decode = batched(decode, ignored_kwargs=frozenset(unused))


def _first_image(info: ImageModelInfo, **fields: Any) -> ImageRequest:
    return ImageRequest(
        prompt="warm-up",
        height=info.height,
        width=info.width,
        num_inference_steps=min(2, info.max_inference_steps),
        **{"request_id": "warm-up"} | fields,
    )


def _warm_up(architecture: str, generator: ImageGenerator, *requests: ImageRequest) -> None:
    """Generate images together, so that a pipeline that cannot do so fails at start.

    Raises: ConfigError.
    """

    def generate(request: ImageRequest) -> None:
        with contextlib.suppress(ContentFiltered):
            generator.generate(request, lambda event: None)

    executor = BatchExecutor()
    try:
        with torch.no_grad():
            for request in requests:
                executor.start(request.request_id, functools.partial(generate, request))
            while len(executor):
                executor.step()
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise ConfigError(
            f"{architecture} cannot generate an image: {first_line(error)}"
        ) from error


def _model_info(config: ImageConfig, pipeline: Any, schedulers: Schedulers) -> ImageModelInfo:
    denoiser = denoiser_of(pipeline)
    parameters = parameters_of(type(pipeline))
    guidance = config.guidance_scale
    if guidance is None:
        guidance = getattr(parameters.get("guidance_scale"), "default", None)
    steps = config.num_inference_steps
    if steps is None:
        steps = parameters["num_inference_steps"].default
    height, width, multiple = _sizes(pipeline, denoiser)
    models = models_of(pipeline).values()
    return ImageModelInfo(
        architecture=type(pipeline).__name__,
        engine=config.engine,
        parameters=sum(p.numel() for model in models for p in model.parameters()),
        dtype=str(weight_dtype(denoiser)).removeprefix("torch."),
        # `cpu_offload` `sequential` leaves parameters on the device `meta` until they are needed.
        devices=sorted(
            {
                str(pipeline._execution_device if p.is_meta else p.device)
                for model in models
                for p in model.parameters()
            }
        ),
        height=height,
        width=width,
        num_inference_steps=min(steps, config.max_inference_steps),
        guidance_scale=0.0 if guidance is None else float(guidance),
        scheduler=schedulers.default_name,
        schedulers=schedulers.names,
        # Where it has a separate guidance scale, it has no effect without that.
        takes_negative_prompt="negative_prompt" in parameters
        and "true_cfg_scale" not in parameters,
        size_multiple=multiple,
        max_side=_max_side(pipeline, denoiser, multiple),
        max_pixels=config.max_pixels or min(4 * height * width, MAX_PIXELS),
        max_inference_steps=config.max_inference_steps,
    )


def _sizes(pipeline: Any, denoiser: Any) -> tuple[int, int, int]:
    """Default height, default width, and the number both must be multiples of, in pixels."""
    scale = getattr(pipeline, "vae_scale_factor", 8)
    latent = getattr(pipeline, "default_sample_size", None) or denoiser.config.sample_size
    height, width = latent if isinstance(latent, (list, tuple)) else (latent, latent)
    patch = 1
    if hasattr(pipeline, "transformer"):
        # Transformers take latents in patches of at least two by two.
        patch = max(2, getattr(denoiser.config, "patch_size", 2))
    return height * scale, width * scale, max(8, scale * patch)


def _max_side(pipeline: Any, denoiser: Any, multiple: int) -> int | None:
    """Maximum side in pixels of a model with a table of position embeddings; None if it has none.

    The table of Stable Diffusion 3 and AuraFlow has a row for each patch of a square image.
    """
    embedding: Any = getattr(denoiser, "pos_embed", None)
    if not getattr(embedding, "pos_embed_max_size", None):
        return None
    patches = math.isqrt(embedding.pos_embed.shape[1])
    side = patches * denoiser.config.patch_size * pipeline.vae_scale_factor
    return int(side - side % multiple)


def _pixels(request: ImageRequest) -> int:
    assert request.height is not None  # noqa: S101 - `ImageModelInfo.checked` has set it
    assert request.width is not None  # noqa: S101
    return request.height * request.width


def _has_pixels(event: ImageEvent) -> bool:
    return event.preview is not None or event.image is not None
