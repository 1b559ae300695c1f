"""ImageProgram: what a rank runs for an image model: messages in, denoising steps, events out."""

from __future__ import annotations

import contextlib
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
    InvalidRequest,
    TriptychError,
    first_line,
)
from runners.contracts.images import MAX_PIXELS, ImageEvent, ImageModelInfo, ImageRequest
from runners.contracts.runner import RunnerState
from runners.images.executor import Studio, gated
from runners.images.generator import Painter
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
from runners.rank.program import Occupancy, RankContext, RankProgram

logger = logging.getLogger("triptych.imaging")


class ImageProgram(RankProgram):
    """Generates the images of a text-to-image model."""

    def __init__(
        self,
        *,
        info: ImageModelInfo,
        painter: Painter,
        max_batch: int,
        emit: Callable[[RankMessage], None],
    ) -> None:
        self._info = info
        self._painter = painter
        self._max_batch = max_batch
        self._emit = emit
        self._studio = Studio()
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
        for item in self._inbox.take(wait=not (len(self._studio) or self._waiting)):
            if isinstance(item, ImageRequest):
                self._waiting.append(item)
            else:
                self._drop(item.request_id)
        # Images are computed without gradients, in this thread and nowhere else.
        torch.set_grad_enabled(False)
        while self._waiting and len(self._studio) < self._max_batch:
            self._begin(self._waiting.popleft())
        self._studio.step()
        self._tell()

    @override
    def occupancy(self) -> Occupancy:
        return Occupancy(running=len(self._studio), waiting=len(self._waiting))

    def _drop(self, request_id: str) -> None:
        self._studio.stop(request_id)
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)

    def _tell(self) -> None:
        """All that happened, in its order; pixels each in a message of their own."""
        for pixels, events in itertools.groupby(self._events, key=_has_pixels):
            for part in ([event] for event in events) if pixels else [list(events)]:
                self._emit(Events(list(part)))
        self._events = []

    def _begin(self, request: ImageRequest) -> None:
        def work() -> None:
            try:
                self._painter.paint(request, lambda event: self._events.append(event))
            except torch.AcceleratorError:  # after which the device computes nothing any more
                raise
            except Exception as error:  # one picture's trouble must not end the rank
                if not isinstance(error, TriptychError):
                    logger.error("a picture failed with %s", type(error).__name__)
                self._emit(request_failed(request.request_id, error))

        self._studio.begin(request.request_id, work)


def image_program(context: RankContext, pipeline: Any) -> ImageProgram:
    """Wrap a placed pipeline: gate its models and measure its limits. Raises: ConfigError."""
    config = context.config
    assert isinstance(config, ImageConfig)  # noqa: S101 - the engines checked it
    if config.attention_slicing:
        # One head after the other; the default is two halves of them.
        pipeline.enable_attention_slicing("max")
    vae = getattr(pipeline, "vae", None)
    if vae is not None and config.vae_slicing:
        vae.enable_slicing()
    if vae is not None and config.vae_tiling:
        vae.enable_tiling()
    schedulers = Schedulers(pipeline.scheduler)
    info = _info(config, pipeline, schedulers)
    _gate(pipeline)
    context.progress(RunnerState.WARMUP, "painting a first picture")
    painter = Painter(pipeline, schedulers, _defaults(config))
    _warm_up(painter, info)
    return ImageProgram(
        info=info, painter=painter, max_batch=config.max_batch_images, emit=context.emit
    )


def _defaults(config: ImageConfig) -> dict[str, object]:
    """What the config has for requests that name nothing, no more steps than it allows."""
    steps, guidance = config.num_inference_steps, config.guidance_scale
    defaults = {
        "num_inference_steps": steps and min(steps, config.max_inference_steps),
        "guidance_scale": guidance,
    }
    return {name: value for name, value in defaults.items() if value is not None}


def _gate(pipeline: Any) -> None:
    """Have every call of the pipeline's models wait for the studio."""
    for name, model in models_of(pipeline).items():
        if name != "safety_checker":  # which is called with lists of its own
            model.forward = gated(model.forward)
        if callable(decode := getattr(model, "decode", None)):
            # Its decoding draws no random numbers, though it takes a generator.
            unused = {"generator"} if isinstance(model, AutoencoderKL) else ()
            model.decode = gated(decode, but=frozenset(unused))


def _warm_up(painter: Painter, info: ImageModelInfo) -> None:
    """A short picture before the first client's: a pipeline that can not paint says so now.

    Raises: ConfigError.
    """
    request = ImageRequest(
        request_id="warm-up",
        prompt="warm-up",
        height=info.height,
        width=info.width,
        num_inference_steps=min(2, info.max_inference_steps),
    )
    try:
        with torch.no_grad(), contextlib.suppress(ContentFiltered):
            painter.paint(request, lambda event: None)
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise ConfigError(
            f"{info.architecture} cannot generate an image: {first_line(error)}"
        ) from error


def _info(config: ImageConfig, pipeline: Any, schedulers: Schedulers) -> ImageModelInfo:
    denoiser = denoiser_of(pipeline)
    parameters = parameters_of(type(pipeline))
    guidance = config.guidance_scale
    if guidance is None:
        guidance = getattr(parameters.get("guidance_scale"), "default", None)
    height, width, multiple = _sizes(pipeline, denoiser)
    models = models_of(pipeline).values()
    return ImageModelInfo(
        architecture=type(pipeline).__name__,
        engine=config.engine,
        parameters=sum(p.numel() for model in models for p in model.parameters()),
        dtype=str(denoiser.dtype).removeprefix("torch."),
        devices=sorted({str(p.device) for model in models for p in model.parameters()}),
        height=height,
        width=width,
        num_inference_steps=min(
            config.num_inference_steps or parameters["num_inference_steps"].default,
            config.max_inference_steps,
        ),
        guidance_scale=float(guidance or 0.0),
        scheduler=schedulers.default,
        schedulers=schedulers.names,
        # Where it has a scale of its own, it does nothing without that.
        takes_negative_prompt="negative_prompt" in parameters
        and "true_cfg_scale" not in parameters,
        size_multiple=multiple,
        max_side=_max_side(pipeline, denoiser, multiple),
        max_pixels=config.max_pixels or min(4 * height * width, MAX_PIXELS),
        max_inference_steps=config.max_inference_steps,
    )


def _sizes(pipeline: Any, denoiser: Any) -> tuple[int, int, int]:
    """The pipeline's own height and width, and what both must be multiples of, in pixels."""
    scale = getattr(pipeline, "vae_scale_factor", 8)
    latent = getattr(pipeline, "default_sample_size", None) or denoiser.config.sample_size
    height, width = latent if isinstance(latent, (list, tuple)) else (latent, latent)
    # Transformers take latents by patches of at least two by two.
    patch = (
        max(2, getattr(denoiser.config, "patch_size", 2)) if hasattr(pipeline, "transformer") else 1
    )
    return height * scale, width * scale, max(8, scale * patch)


def _max_side(pipeline: Any, denoiser: Any, multiple: int) -> int | None:
    """Longest side in pixels of a model whose positions are a table that it cuts pieces from.

    The table holds a vector for each patch of a square: so have it Stable Diffusion 3 and AuraFlow.
    """
    embedding: Any = getattr(denoiser, "pos_embed", None)
    if not getattr(embedding, "pos_embed_max_size", None):
        return None
    patches = math.isqrt(embedding.pos_embed.shape[1])
    side = patches * denoiser.config.patch_size * pipeline.vae_scale_factor
    return int(side - side % multiple)


def _has_pixels(event: ImageEvent) -> bool:
    return event.preview is not None or event.image is not None
