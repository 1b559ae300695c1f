"""Two pipelines of diffusers with random weights, in the shapes of Stable Diffusion 1.5 and XL."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.models import SEED

PROMPTS = ("a red circle", "a large blue square on the left", "two rings and a cross")


def prompt_of(number: int) -> str:
    """A prompt for each image."""
    return PROMPTS[number % len(PROMPTS)]


def image_model(kind: str, device: Device, folder: Path) -> Path:
    """The folder of a pipeline with random weights in bfloat16, written the first time."""
    target = folder / f"images-{kind}"
    if not (target / "model_index.json").exists():
        torch.manual_seed(SEED)
        scratch = folder / f"images-{kind}-tokenizer"
        make: dict[str, Callable[..., Any]] = {"sd15": _sd15, "sdxl": _sdxl}
        pipeline = make[kind](scratch, device)
        pipeline.to(torch.bfloat16).save_pretrained(target)
    return target


def _diffusers() -> Any:
    """The module, which has no types."""
    return importlib.import_module("diffusers")


def _clip(tokenizer: Any, width: int, layers: int, *, projected: bool = False) -> Any:
    import transformers as tf

    cls = tf.CLIPTextModelWithProjection if projected else tf.CLIPTextModel
    return cls(
        tf.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=max(width // 64, 1),
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _vae(sample_size: int, channels: Sequence[int]) -> Any:
    return _diffusers().AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, channels[0] // 4),
        sample_size=sample_size,
    )


def _sd15(scratch: Path, device: Device) -> Any:
    from demo_models.image.tokenizer import train_tokenizer

    df = _diffusers()
    tokenizer = train_tokenizer(PROMPTS, scratch)
    channels = device.pick((320, 640, 1280, 1280), (32, 64))
    width = device.pick(768, 64)
    levels = len(channels) - 1
    with torch.device(device.target):
        unet = df.UNet2DConditionModel(
            sample_size=device.pick(64, 16),
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
            layers_per_block=device.pick(2, 1),
            cross_attention_dim=width,
            attention_head_dim=8,
            norm_num_groups=device.pick(32, 8),
        )
        vae = _vae(device.pick(512, 32), device.pick((128, 256, 512, 512), (16, 32)))
        text_encoder = _clip(tokenizer, width, device.pick(12, 2))
    return df.StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=df.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(scratch: Path, device: Device) -> Any:
    from demo_models.image.tokenizer import train_tokenizer

    df = _diffusers()
    tokenizer = train_tokenizer(PROMPTS, scratch)
    with torch.device(device.target):
        unet = df.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=1280 + 6 * 256,
            use_linear_projection=True,
        )
        vae = _vae(1024, (128, 256, 512, 512))
        first = _clip(tokenizer, 768, 12)
        second = _clip(tokenizer, 1280, 32, projected=True)
    return df.StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=df.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )
