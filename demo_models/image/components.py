"""The untrained components of the demo image model, about two million parameters in all."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from demo_models.image.drawing import SIDE
from demo_models.image.tokenizer import CONTEXT_LENGTH

LATENT_SIDE = SIDE // 4
LATENT_CHANNELS = 4
_TEXT_WIDTH = 64


def new_autoencoder() -> Any:
    """A VAE between pixels and latents of a quarter of their width and height."""
    autoencoder: Any = AutoencoderKL(  # type: ignore[no-untyped-call]
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    # The second half of the encoder's outputs is the log-variance of the noise. Untrained, it would
    # add so much noise that training makes no progress for a long time.
    torch.nn.init.constant_(autoencoder.quant_conv.bias[LATENT_CHANNELS:], -6.0)
    return autoencoder


def new_text_encoder(tokenizer: Any) -> Any:
    """A CLIP text encoder from token ids to the states that the denoiser attends to."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_denoiser() -> Any:
    """A U-Net that predicts the velocity of latents and attends to the prompt at low resolution."""
    return UNet2DConditionModel(  # type: ignore[no-untyped-call]
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 80),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=_TEXT_WIDTH,
        # The pooled prompt reaches every layer together with the time step.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        norm_num_groups=4,
    )


def new_scheduler() -> Any:
    """A noise schedule that ends in pure noise, so that plain backgrounds come out plain."""
    return DDIMScheduler(  # type: ignore[no-untyped-call]
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.02,
        clip_sample=False,
        prediction_type="v_prediction",
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )
