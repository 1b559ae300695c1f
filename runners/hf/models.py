"""Facts about a Hugging Face model folder: tokenizer, context length, generation defaults."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from runners.contracts.errors import ConfigError
from runners.hf.dtypes import dtype_in

logger = logging.getLogger("triptych.hf")


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request's None means: the model's generation config, else neutral."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


IGNORED_GENERATION_KEYS = (
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
    "min_p",
    "typical_p",
    "encoder_repetition_penalty",
)
"""What generation_config.json may ask of `generate` and this engine does not do."""


def stored_dtype(config: PreTrainedConfig, folder: Path) -> torch.dtype | None:
    """The dtype of the weights: as the config says, else that of the first floating tensor."""
    if isinstance(said := getattr(config, "dtype", None), torch.dtype):
        return said
    files = sorted(folder.glob("*.safetensors"))
    return dtype_in(files[0]) if files else None


def load_tokenizer(path: Path) -> Any:  # AutoTokenizer's class is only known at run time
    """The tokenizer of a model folder. Raises: ConfigError."""
    with loading_of(f"the tokenizer of {path.name}"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


@contextmanager
def loading_of(what: str) -> Iterator[None]:
    """Turn whatever a library raises about a model that can not be loaded into a sentence.

    Such errors come as any type and do not go away by trying again. Memory may, later.
    Raises: ConfigError.
    """
    try:
        yield
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{what} can not be loaded: {type(error).__name__}: {reason}") from error


def context_length(config: PreTrainedConfig) -> int:
    """Longest prompt plus output of a model, in tokens."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") in ("dynamic", "longrope") and original is not None:
        # Beyond it the frequencies follow the longest position of a forward, whoever's it is.
        logger.warning(
            "the context is cut to %d tokens: longer ones would differ in a batch", original
        )
        return int(original)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return 2048  # ALiBi models name no limit; this is what they were usually trained on


def eos_ids(generation: GenerationConfig | None, vocab_size: int) -> frozenset[int]:
    """The end tokens that a generation config names."""
    eos = generation.eos_token_id if generation else None
    ids = frozenset([eos] if isinstance(eos, int) else eos or ())
    outside = {i for i in ids if not 0 <= i < vocab_size}
    if outside:
        logger.warning("end tokens %s are outside the vocabulary: ignored", sorted(outside))
    return ids - outside


def warn_of_ignored(own: GenerationConfig | None) -> None:
    """Log which keys of a generation config have no effect here."""
    neutral = GenerationConfig()  # type: ignore[no-untyped-call]
    ignored = [
        name
        for name in IGNORED_GENERATION_KEYS
        if getattr(own, name, None) not in (None, getattr(neutral, name, None))
    ]
    if ignored:
        logger.warning("generation_config.json: ignored here: %s", ", ".join(ignored))


def sampling_defaults(own: GenerationConfig | None) -> SamplingDefaults:
    """The model's generation config where it says something, as vLLM and transformers do."""
    neutral = SamplingDefaults()
    if own is None:
        return neutral

    def value(name: str, otherwise: float) -> Any:
        found = getattr(own, name, None)
        return otherwise if found is None else found

    sampled = bool(own.do_sample)
    return SamplingDefaults(
        temperature=value("temperature", 1.0) if sampled else 0.0,
        top_p=value("top_p", 1.0) if sampled else 1.0,
        top_k=value("top_k", 0) if sampled else 0,
        repetition_penalty=value("repetition_penalty", 1.0),
    )


def devices(model: PreTrainedModel) -> list[str]:
    """Where the parts of a placed model lie."""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    names = {f"cuda:{d}" if isinstance(d, int) else str(d) for d in placed.values()}
    return sorted(names)
