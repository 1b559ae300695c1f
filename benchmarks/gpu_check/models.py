"""The models of the check: small ones of several architectures, and one with 8 billion parameters.

All have random weights, and nothing is downloaded. The largest logits are always of the first
tokens, which are those that the tokenizer can spell.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from benchmarks.gpu_check.device import Device
from tests.support.models import VOCAB, write_tokenizer

SEED = 20240701
HEAD_SIZE, LAYERS, WINDOW = 64, 3, 48

_GATED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": HEAD_SIZE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "max_position_embeddings": 2048,
}
SHAPES: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_GATED),
    "qwen3": lambda: tf.Qwen3Config(**_GATED),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GATED, sliding_window=WINDOW),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_GATED,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    ),
    "bloom": lambda: tf.BloomConfig(
        vocab_size=VOCAB, hidden_size=256, n_layer=LAYERS, n_head=4, bos_token_id=0, eos_token_id=1
    ),
    "mixtral": lambda: tf.MixtralConfig(**_GATED, num_local_experts=4),
}
"""Full attention, normalised heads, windows, windows with sinks and experts, ALiBi, experts."""

LARGE: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
}
"""Llama 3 8B's shape."""
LARGE_DRY = LARGE | {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def small_model(kind: str, dtype: torch.dtype, folder: Path) -> Path:
    """The folder of a model of `SHAPES`, written the first time."""
    name = f"{kind}-{dtype}".replace("torch.", "")

    def write(target: Path) -> None:
        torch.manual_seed(SEED + len(kind))
        model: Any = tf.AutoModelForCausalLM.from_config(SHAPES[kind]())  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                # Random weights of the usual size give nearly flat logits, where rounding decides.
                if parameter.ndim > 1:
                    parameter.mul_(3)
        model.generation_config = tf.GenerationConfig(bos_token_id=0, eos_token_id=1)  # type: ignore[no-untyped-call]
        model.to(dtype).save_pretrained(target)

    return written(folder / name, write)


def large_model(device: Device) -> Any:
    """A Llama with 8 billion parameters in bfloat16, made on the device; the same every time."""
    torch.manual_seed(SEED)
    config = tf.LlamaConfig(**device.pick(LARGE, LARGE_DRY))
    with torch.device(device.target):
        model: Any = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB:] = 0
    model.generation_config = tf.GenerationConfig(do_sample=False)  # type: ignore[no-untyped-call]
    return model.eval().requires_grad_(False)


def large_model_folder(device: Device, folder: Path) -> Path:
    """The folder of `large_model`, written the first time: 16 GB."""

    def write(target: Path) -> None:
        large_model(device).save_pretrained(target, max_shard_size="4GB")
        device.release()

    return written(folder / "large", write)


def written(folder: Path, write: Callable[[Path], None]) -> Path:
    """A model's folder, complete with a tokenizer."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        write_tokenizer(partial)
        partial.rename(folder)
    return folder
