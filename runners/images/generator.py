"""One picture: the pipeline's own `__call__`, with each step told and previews on the way."""

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

logger = logging.getLogger("triptych.imaging")


class Painter:
    """Paints with one pipeline, whose models are gated (see `easel`).

    `defaults`: what a request has that names nothing, where the pipeline's own will not do.
    """

    def __init__(
        self, pipeline: Any, schedulers: Schedulers, defaults: Mapping[str, object]
    ) -> None:
        self._pipeline = pipeline
        self._schedulers = schedulers
        self._defaults = defaults
        self._parameters = parameters_of(type(pipeline))

    def paint(self, request: ImageRequest, tell: Callable[[ImageEvent], None]) -> None:
        """Paint one picture whose `height` and `width` are given; `tell` gets its events.

        Raises: ContentFiltered, EngineFailure, and what the pipeline does.
        """
        own = self._own_pipeline(request)
        progress = _Progress(own, request, tell)
        # Always of the CPU: the same seed gives the same noise on every device.
        generator = torch.Generator("cpu").manual_seed(request.seed)
        named = {
            "negative_prompt": request.negative_prompt,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
        }
        wishes = {**self._defaults, **{k: v for k, v in named.items() if v is not None}}
        output = own(
            prompt=request.prompt,
            height=request.height,
            width=request.width,
            generator=generator,
            output_type="np",
            **{k: v for k, v in wishes.items() if k in self._parameters},
        )
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            # The pipeline has blackened it.
            raise ContentFiltered(
                "the model's safety checker withholds this picture; another prompt or seed may do"
            )
        tell(progress.event(image=_raw_image(output.images[0])))

    def _own_pipeline(self, request: ImageRequest) -> Any:
        """The pipeline with a scheduler and a state of its own; the models are the same ones."""
        own = copy.copy(self._pipeline)
        own.scheduler = self._schedulers.make(request.scheduler)
        # It would take the models off the GPU under other pictures' hands; each makes room for the
        # next by itself.
        own.maybe_free_model_hooks = lambda: None
        return own


class _Progress:
    """What has been done of a picture."""

    def __init__(
        self, pipeline: Any, request: ImageRequest, tell: Callable[[ImageEvent], None]
    ) -> None:
        self._pipeline = pipeline
        self._request = request
        self._tell = tell
        self._done = 0
        pipeline.scheduler.step = self._watched(pipeline.scheduler.step)

    def _watched(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's `step`, with which every pipeline ends each of its steps."""

        # Pipelines look at its parameters to know whether it draws random numbers.
        @functools.wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self._done += 1
            preview = self._try_preview(result) if self._done in self._preview_steps() else None
            self._tell(self.event(preview=preview))
            return result

        return watched

    def event(
        self, *, preview: RawImage | None = None, image: RawImage | None = None
    ) -> ImageEvent:
        """Where the picture is."""
        return ImageEvent(
            request_id=self._request.request_id,
            step=self._done,
            steps=self._steps,
            preview=preview,
            image=image,
        )

    @property
    def _steps(self) -> int:
        return len(self._pipeline.scheduler.timesteps)

    def _preview_steps(self) -> set[int]:
        wanted = self._request.previews
        return {round(self._steps * i / (wanted + 1)) for i in range(1, wanted + 1)}

    def _try_preview(self, result: Any) -> RawImage | None:
        """None also where it fails, of memory say: the picture itself may still come about."""
        try:
            return self._preview(result)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            logger.warning("a preview failed with %s", type(error).__name__)
            return None

    def _preview(self, result: Any) -> RawImage | None:
        """None where only the pipeline itself knows how to decode its latents, and where it would
        show what a safety checker has not seen.

        Most schedulers tell, beside the next latents, what the picture is going to be.
        """
        if getattr(self._pipeline, "safety_checker", None) is not None:
            return None
        latents, *more = result if isinstance(result, tuple) else result.to_tuple()
        if more and torch.is_tensor(more[0]) and more[0].shape == latents.shape:
            latents = more[0]
        pipeline, height, width = self._pipeline, self._request.height, self._request.width
        if hasattr(pipeline, "_unpack_latents"):  # Flux keeps them as patches
            latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
        config: Any = getattr(getattr(pipeline, "vae", None), "config", None)
        if config is None or latents.ndim != 4 or getattr(config, "latents_mean", None):
            return None
        scale, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        latents = (latents / scale + shift).to(pipeline.vae.dtype)
        pixels = pipeline.vae.decode(latents, return_dict=False)[0]
        if hasattr(pipeline.image_processor, "resize_and_crop_tensor"):
            # PixArt paints in the nearest of the sizes it knows.
            pixels = pipeline.image_processor.resize_and_crop_tensor(pixels, width, height)
        return _raw_image(pipeline.image_processor.postprocess(pixels, output_type="np")[0])


def _raw_image(pixels: Any) -> RawImage:
    """(height, width, 3) from 0 to 1, as bytes. Raises: EngineFailure if it is none."""
    if not np.isfinite(pixels).all():
        raise EngineFailure(
            "the model computed no numbers for some pixels; its dtype may be too narrow for it"
        )
    data = (pixels * 255).round().astype(np.uint8)
    height, width, _ = data.shape
    return RawImage(width=width, height=height, data=data.tobytes())
