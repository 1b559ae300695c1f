"""What a RunnerConfig says of image models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from runners.contracts.images import MAX_PIXELS


class ImageFields(BaseModel):
    """What every engine understands of image models."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Denoising steps of a request that names none. Default: the pipeline's own."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """That of a request that names none. Default: the pipeline's own."""
    max_batch_images: Annotated[int, Field(ge=1, le=256)] = 8
    """Pictures that a rank paints together in one step."""
    max_pixels: Annotated[int, Field(ge=64, le=MAX_PIXELS)] | None = None
    """Most pixels of a picture, height times width; 8192 times 8192 at most. Default: four times
    those of the model's own size."""
    max_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 200
    """Most denoising steps of a picture."""
    cpu_offload: Literal["model", "sequential"] | None = None
    """Keeps the weights in the CPU's memory and on the GPU only what computes: one `model` of the
    pipeline at a time, or, slower and with the least memory, one layer: `sequential`."""
    attention_slicing: bool = False
    """Computes a U-Net's attention head by head: less memory, slower. Transformers have none of
    it."""
    vae_slicing: bool = False
    """Decodes pictures one by one: less memory."""
    vae_tiling: bool = False
    """Decodes a picture in overlapping tiles: less memory for large ones."""
