"""Generates one image: the pipeline's own `__call__`, with events for its steps and previews.

Called by the image program, in rank processes.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from runners.contracts.errors import ContentFiltered, EngineFailure
from runners.contracts.images import ImageEvent, ImageRequest, RawImage
from runners.images.pipeline import parameters_of
from runners.images.schedulers import Schedulers

logger = logging.getLogger("triptych.images")


class ImageGenerator:
    """Generates images with one pipeline, whose models are wrapped by `executor.batched`.

    `defaults`: arguments of the pipeline that a request may leave unset, where the pipeline's own
    defaults are not wanted.
    """

    def __init__(
        self, pipeline: Any, schedulers: Schedulers, defaults: Mapping[str, object]
    ) -> None:
        self._pipeline = pipeline
        self._schedulers = schedulers
        self._defaults = defaults
        self._parameters = parameters_of(type(pipeline))

    def generate(self, request: ImageRequest, emit: Callable[[ImageEvent], None]) -> None:
        """Generate one image, whose `height` and `width` are set; `emit` receives its events.

        Raises: ContentFiltered, EngineFailure, and what the pipeline raises.
        """
        pipeline = self._copy_pipeline(request)
        reporter = _StepReporter(pipeline, request, emit)
        # Always on the CPU, so that a seed gives the same noise on every device.
        generator = torch.Generator("cpu").manual_seed(request.seed)
        options = {
            "negative_prompt": request.negative_prompt,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
        }
        arguments = {**self._defaults, **{k: v for k, v in options.items() if v is not None}}
        output = pipeline(
            prompt=request.prompt,
            height=request.height,
            width=request.width,
            generator=generator,
            output_type="np",
            **{k: v for k, v in arguments.items() if k in self._parameters},
        )
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            # The pipeline has replaced it by a black image.
            raise ContentFiltered(
                "the model's safety checker rejected the image; try another prompt or seed"
            )
        emit(reporter.event(image=_raw_image(output.images[0])))

    def _copy_pipeline(self, request: ImageRequest) -> Any:
        """The pipeline with a state and a scheduler for one image, and the same models."""
        pipeline = copy.copy(self._pipeline)
        pipeline.scheduler = self._schedulers.make(request.scheduler)
        # It would move models off the GPU while other images use them. Each model's own hook
        # already makes room for the next.
        pipeline.maybe_free_model_hooks = lambda: None
        return pipeline


class _StepReporter:
    """Emits an event after each of a pipeline's denoising steps."""

    def __init__(
        self, pipeline: Any, request: ImageRequest, emit: Callable[[ImageEvent], None]
    ) -> None:
        self._pipeline = pipeline
        self._request = request
        self._emit = emit
        self._steps_done = 0
        pipeline.scheduler.step = self._reporting(pipeline.scheduler.step)

    def _reporting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's `step`, which every pipeline calls at the end of a denoising step."""

        # Pipelines inspect its signature to learn whether it takes a random generator.
        @functools.wraps(step)
        def reporting_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self._steps_done += 1
            wanted = self._steps_done in self._preview_steps()
            self._emit(self.event(preview=self._try_preview(result) if wanted else None))
            return result

        return reporting_step

    def event(
        self, *, preview: RawImage | None = None, image: RawImage | None = None
    ) -> ImageEvent:
        """The current step as an event."""
        return ImageEvent(
            request_id=self._request.request_id,
            step=self._steps_done,
            steps=self._steps,
            preview=preview,
            image=image,
        )

    @property
    def _steps(self) -> int:
        return len(self._pipeline.scheduler.timesteps)

    def _preview_steps(self) -> set[int]:
        count = self._request.previews
        return {round(self._steps * i / (count + 1)) for i in range(1, count + 1)}

    def _try_preview(self, result: Any) -> RawImage | None:
        """The preview; None if it fails, for lack of memory say: the image may still succeed."""
        try:
            return self._preview(result)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            logger.warning(
                "a preview failed with %s",
                type(error).__name__,
                extra={"request_id": self._request.request_id},
            )
            return None

    def _preview(self, result: Any) -> RawImage | None:
        """The image that the model expects, decoded from a scheduler step's `result`.

        None if only the pipeline can decode its latents, and if it has a safety checker, which
        does not see previews.
        """
        if getattr(self._pipeline, "safety_checker", None) is not None:
            return None
        latents, *others = result if isinstance(result, tuple) else result.to_tuple()
        # Most schedulers return a prediction of the final latents after those of the next step.
        if others and torch.is_tensor(others[0]) and others[0].shape == latents.shape:
            latents = others[0]
        pipeline, height, width = self._pipeline, self._request.height, self._request.width
        if hasattr(pipeline, "_unpack_latents"):  # Flux's latents are patches
            latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
        config: Any = getattr(getattr(pipeline, "vae", None), "config", None)
        if config is None or latents.ndim != 4 or getattr(config, "latents_mean", None):
            return None
        shift = getattr(config, "shift_factor", None)
        latents = latents / config.scaling_factor + (0.0 if shift is None else shift)
        pixels = pipeline.vae.decode(latents.to(pipeline.vae.dtype), return_dict=False)[0]
        if hasattr(pipeline.image_processor, "resize_and_crop_tensor"):
            # PixArt generates in the nearest of the sizes that it supports.
            pixels = pipeline.image_processor.resize_and_crop_tensor(pixels, width, height)
        return _raw_image(pipeline.image_processor.postprocess(pixels, output_type="np")[0])


def _raw_image(pixels: Any) -> RawImage:
    """Convert pixels of shape (height, width, 3) from 0 to 1. Raises: EngineFailure for NaN."""
    if not np.isfinite(pixels).all():
        raise EngineFailure(
            "the model computed pixels that are not finite; its dtype may be too narrow"
        )
    data = (pixels * 255).round().astype(np.uint8)
    height, width, _ = data.shape
    return RawImage(width=width, height=height, data=data.tobytes())
