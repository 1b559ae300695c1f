"""Tiny Hugging Face models of many architectures, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB, WIDTH, LAYERS, HEADS = 320, 64, 3, 4
EOS = 1

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "max_position_embeddings": 512,
}
_GATED: dict[str, Any] = _COMMON | {"intermediate_size": 2 * WIDTH, "num_key_value_heads": 2}
_OLD: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": EOS,
}

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_GATED),
    "mistral": lambda: tf.MistralConfig(**_GATED, sliding_window=16),
    "qwen2": lambda: tf.Qwen2Config(**_GATED),
    "opt": lambda: tf.OPTConfig(**_COMMON, ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH),
    "gpt2": lambda: tf.GPT2Config(**_OLD),
    "gptj": lambda: tf.GPTJConfig(**_OLD, rotary_dim=8),
    "bloom": lambda: tf.BloomConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=0,
        eos_token_id=EOS,
    ),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        **{k: v for k, v in _COMMON.items() if not k.startswith("num_")},
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1], [["global"], 1]],
        window_size=16,
    ),
    "mpt": lambda: tf.MptConfig(
        vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=512
    ),
    "falcon": lambda: tf.FalconConfig(**_COMMON, new_decoder_architecture=True, num_kv_heads=2),
    "gemma2": lambda: tf.Gemma2Config(**_GATED, head_dim=16, sliding_window=16),
    # Its window is in the mask only, never handed to the attention function.
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **_GATED,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=WIDTH,
        num_experts=4,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention"] * LAYERS,
    ),
    "phi": lambda: tf.PhiConfig(**_COMMON, intermediate_size=2 * WIDTH),
    "phi3": lambda: tf.Phi3Config(**_GATED),
    "qwen3": lambda: tf.Qwen3Config(**_GATED, head_dim=16),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_COMMON, intermediate_size=2 * WIDTH),
    "gemma": lambda: tf.GemmaConfig(**_GATED, head_dim=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GATED, head_dim=16, sliding_window=16),
    "starcoder2": lambda: tf.Starcoder2Config(**_GATED),
    "mixtral": lambda: tf.MixtralConfig(**_GATED, num_local_experts=4),
    # Scales the queries of some layers by the length of the cache, for the whole batch alike.
    "llama4_text": lambda: tf.Llama4TextConfig(
        **_GATED,
        intermediate_size_mlp=2 * WIDTH,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=64,
        no_rope_layers=[1, 0, 1],
        floor_scale=8,
        attn_scale=2.0,
    ),
    # Scales its queries by position.
    "ministral3": lambda: tf.Ministral3Config(
        **_GATED,
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    ),
    # Two whose routers read the weights of a linear layer, instead of calling it.
    "hunyuan_v1_moe": lambda: tf.HunYuanMoEV1Config(
        **_GATED, head_dim=16, num_experts=4, moe_topk=2
    ),
    "longcat_flash": lambda: tf.LongcatFlashConfig(
        **{k: v for k, v in _COMMON.items() if k != "num_hidden_layers"},
        num_layers=2,
        ffn_hidden_size=2 * WIDTH,
        expert_ffn_hidden_size=WIDTH,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
    ),
    "falcon_mq": lambda: tf.FalconConfig(**_COMMON, multi_query=True),
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer that can spell anything."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, the cat sat on the mat"] * 3, trainer)
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_metaspace_tokenizer(folder: Path) -> None:
    """A tokenizer in the manner of SentencePiece with byte fallback (Llama 2, Mistral)."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(
        ["hello world the cat sat on the mat and naive cafe"] * 3, trainer
    )
    # Byte pieces are ordinary tokens to the decoder, not special ones.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_model(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder of architecture `kind` with a tokenizer. Weights are seeded."""
    torch.manual_seed(len(kind))
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            # Random weights of the usual size give nearly flat logits; parity wants no near-ties.
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.generation_config = tf.GenerationConfig(bos_token_id=0, eos_token_id=EOS)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def greedy(
    folder: Path, prompts: list[str] | list[list[int]], count: int, *, dtype: str = "auto"
) -> list[list[int]]:
    """`model.generate(do_sample=False)` of each prompt alone: `count` tokens, none ends it.

    The weights are rounded to `dtype`, and the arithmetic is float32.
    """
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = EOS
    out = []
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        inputs = torch.tensor([ids])
        full = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=count,
        )
        out.append(full[0, len(ids) :].tolist())
    return out
