"""Tiny diffusers pipelines of many classes, with random weights, as folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from demo_models.image.tokenizer import train_tokenizer

PROMPTS = ("a red circle", "a large blue square on the left", "two rings and a cross")
SIDE = 32
"""Default width and height of most of these pipelines, in pixels."""


def write_image_model(family: str, folder: Path) -> Path:
    """Write a pipeline of one of `FAMILIES`; its weights are the same each time."""
    torch.manual_seed(0)
    FAMILIES[family](folder.parent / f"{folder.name}-tokenizer").save_pretrained(folder)
    return folder


def _clip_tokenizer(scratch: Path) -> Any:
    return train_tokenizer(PROMPTS, scratch)


def _clip(tokenizer: Any, *, projected: bool = False) -> Any:
    cls = tf.CLIPTextModelWithProjection if projected else tf.CLIPTextModel
    return cls(
        tf.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(width: int = 32) -> tuple[Any, Any]:
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )
    config = tf.T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return fast, tf.T5EncoderModel(config)


def _vae(channels: int = 4, *, levels: int = 2, **options: Any) -> Any:
    return df.AutoencoderKL(
        block_out_channels=(16,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIDE,
        **options,
    )


def _unet(**options: Any) -> Any:
    return df.UNet2DConditionModel(
        sample_size=SIDE // 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        **{"attention_head_dim": 4, "cross_attention_dim": 32} | options,
    )


def _stable_diffusion(scratch: Path) -> Any:
    tokenizer = _clip_tokenizer(scratch)
    return df.StableDiffusionPipeline(
        vae=_vae(),
        unet=_unet(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        scheduler=df.PNDMScheduler(
            beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(scratch: Path) -> Any:
    tokenizer = _clip_tokenizer(scratch)
    return df.StableDiffusionXLPipeline(
        vae=_vae(),
        unet=_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
        ),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=df.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )


def _stable_diffusion_3(scratch: Path) -> Any:
    tokenizer = _clip_tokenizer(scratch)
    t5_tokenizer, t5 = _t5(64)
    return df.StableDiffusion3Pipeline(
        transformer=df.SD3Transformer2DModel(
            sample_size=SIDE // 2,
            patch_size=1,
            in_channels=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            out_channels=8,
            pos_embed_max_size=64,
        ),
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(8, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=_clip(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, projected=True),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def _pixart(scratch: Path) -> Any:
    tokenizer, t5 = _t5()
    return df.PixArtAlphaPipeline(
        transformer=df.PixArtTransformer2DModel(
            sample_size=32,  # generates only some sizes, and resizes the nearest of them
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=32,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=32,
            use_additional_conditions=False,
        ),
        scheduler=df.DPMSolverMultistepScheduler(),
        vae=_vae(levels=4),
        text_encoder=t5,
        tokenizer=tokenizer,
    )


def _flux(scratch: Path) -> Any:
    tokenizer = _clip_tokenizer(scratch)
    t5_tokenizer, t5 = _t5()
    return df.FluxPipeline(
        transformer=df.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    )


def add_safety_checker(folder: Path, *, rejects: bool) -> None:
    """Give a Stable Diffusion a safety checker that rejects all images or none."""
    from diffusers.pipelines.stable_diffusion.safety_checker import (
        StableDiffusionSafetyChecker,
    )

    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = tf.CLIPConfig(
        vision_config=tower | {"image_size": SIDE, "patch_size": 8},
        text_config=tower | {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1},
        projection_dim=8,
    )
    checker: Any = StableDiffusionSafetyChecker(config)
    for bounds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        bounds.data.fill_(-2.0 if rejects else 2.0)  # of cosines
    checker.save_pretrained(folder / "safety_checker")
    side = {"shortest_edge": SIDE}
    extractor = tf.CLIPImageProcessorPil(size=side, crop_size={"height": SIDE, "width": SIDE})
    extractor.save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))


FAMILIES: dict[str, Callable[[Path], Any]] = {
    "stable-diffusion": _stable_diffusion,
    "stable-diffusion-xl": _stable_diffusion_xl,
    "stable-diffusion-3": _stable_diffusion_3,
    "pixart": _pixart,
    "flux": _flux,
}
