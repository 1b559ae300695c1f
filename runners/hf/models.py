"""Facts about a Hugging Face model folder: tokenizer, context length, generation defaults.

The engines and the programs call this in rank processes only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as tf_logging

from runners.config.support import refuse_without_tokenizer
from runners.contracts.errors import ConfigError, reraise_as
from runners.contracts.validation import problems_of
from runners.hf.dtypes import dtype_in

logger = logging.getLogger("triptych.hf")

GENERATION = "generation_config.json"

DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""What torch raises about a device, not about a model: another start may not have it."""


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for parameters that a request leaves out: of the config, else of the model."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """None if neither sets one: decoding is greedy, unless the route has a default."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, AfterValidator(lambda top_k: max(top_k, 0))] = 0
    """0 keeps all, for which some files have -1."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


_SAMPLING_DEFAULTS = TypeAdapter(SamplingDefaults)

HONOURED_GENERATION_KEYS = {
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("eos_token_id", "max_new_tokens", "min_new_tokens", "stop_strings"),
}
"""Keys of generation_config.json that have their effect here."""
_WITHOUT_EFFECT = {
    # Facts about the model that the tokenizer or the prompt settle.
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    # How `generate` keeps its cache, and what it returns.
    *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache"),
    *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_logits", "trust_remote_code", "disable_compile", "compile_config"),
    *("max_time", "continuous_batching_config", "is_assistant", "assistant_early_exit"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    *("max_matching_ngram_size", "prefill_chunk_size", "chat_format", "early_stopping"),
}
"""Keys that do not change which tokens are generated."""
NEUTRAL_GENERATION: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("length_penalty", "typical_p", "encoder_repetition_penalty"), 1.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff"), 0.0),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing"), False),
    "low_memory": False,
    "max_length": 20,
}
"""The values with which other keys have no effect: the defaults of transformers 4, in old files."""


def stored_dtype(config: PreTrainedConfig, folder: Path) -> torch.dtype | None:
    """The dtype of the weights: that of the config, else of the first floating-point tensor."""
    if isinstance(dtype := getattr(config, "dtype", None), torch.dtype):
        return dtype
    files = sorted(folder.glob("*.safetensors"))
    return dtype_in(files[0]) if files else None


def load_tokenizer(path: Path) -> Any:  # AutoTokenizer's class is only known at run time
    """The tokenizer of a model folder. Raises: ConfigError."""
    refuse_without_tokenizer({file.name for file in path.iterdir()})
    with loading(f"the tokenizer of {path.name}"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Load `name` without progress bars, and turn the errors of libraries into ConfigError.

    Such an error persists at a restart. Running out of memory may not, so that passes.
    """
    _join_log_of_process()
    with reraise_as(ConfigError, f"{name} cannot be loaded", passing=DEVICE_ERRORS):
        yield


def _join_log_of_process() -> None:
    """Log transformers' warnings as the process does its own, and no progress bars among them."""
    tf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tf_logging.disable_default_handler()
    tf_logging.enable_propagation()


def context_length(config: PreTrainedConfig) -> int:
    """Longest prompt plus output of a model, in tokens."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    switches = [
        int(each["original_max_position_embeddings"])
        for each in (rope, *rope.values())  # some models have one for each type of layer
        if isinstance(each, dict)
        and each.get("rope_type") in ("dynamic", "longrope")
        and each.get("original_max_position_embeddings") is not None
    ]
    if switches:
        # Beyond it, the longest sequence of a batch sets the frequencies of all the others.
        limit = min(switches)
        logger.warning(
            "the context is limited to %d tokens: longer ones would depend on the batch", limit
        )
        return limit
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return 2048  # ALiBi models state no limit; most were trained on this length


def end_token_ids(
    generation: GenerationConfig | None, tokenizer: Any, vocab_size: int
) -> frozenset[int]:
    """The end tokens that the generation config and the tokenizer name.

    A fine-tune often changes the tokenizer's alone, the end of a turn, and keeps the generation
    config of its base model. Ids outside the vocabulary are ignored. Raises: ConfigError for what
    is no id.
    """
    sources = [generation.eos_token_id if generation else None, tokenizer.eos_token_id]
    tokens = [
        token
        for source in sources
        if source is not None
        for token in (source if isinstance(source, list) else [source])
    ]
    if not all(isinstance(token, int) for token in tokens):
        raise ConfigError("must be a token id or several", field="eos_token_id", source=GENERATION)
    ids = frozenset(tokens)
    outside = {i for i in ids if not 0 <= i < vocab_size}
    if outside:
        logger.warning("end tokens %s are outside the vocabulary: ignored", sorted(outside))
    return ids - outside


def warn_about_ignored(generation: GenerationConfig | None) -> None:
    """Log the keys of a generation config that have no effect."""
    if generation is None:
        return
    known = HONOURED_GENERATION_KEYS | _WITHOUT_EFFECT
    ignored = [
        name
        for name, value in generation.to_diff_dict().items()
        if not (name in known or name.startswith("_") or value == NEUTRAL_GENERATION.get(name))
    ]
    if ignored:
        logger.warning("generation_config.json: ignored keys: %s", ", ".join(ignored))


def sampling_defaults(generation: GenerationConfig | None) -> SamplingDefaults:
    """The defaults of a generation config, with the meaning they have in transformers and vLLM.

    Raises: ConfigError that names the key with a value that cannot be.
    """
    neutral = SamplingDefaults()
    if generation is None:
        return neutral

    def value(name: str, default: object) -> Any:
        configured = getattr(generation, name, None)
        return default if configured is None else configured

    sampled, stop = bool(generation.do_sample), value("stop_strings", ())
    defaults = {
        "temperature": value("temperature", 1.0) if sampled else None,
        "top_p": value("top_p", 1.0) if sampled else 1.0,
        "top_k": value("top_k", 0) if sampled else 0,
        "min_p": value("min_p", 0.0) if sampled else 0.0,
        "repetition_penalty": value("repetition_penalty", 1.0),
        "min_new_tokens": value("min_new_tokens", 0),
        "max_new_tokens": generation.max_new_tokens,
        "stop": (stop,) if isinstance(stop, str) else stop,
    }
    try:
        return _SAMPLING_DEFAULTS.validate_python(defaults)
    except ValidationError as error:
        problem = problems_of(error)[0]
        raise ConfigError(problem.requirement, field=problem.field, source=GENERATION) from None


def devices(model: PreTrainedModel) -> list[str]:
    """The devices that a model's parts are on, sorted by name."""
    device_map = getattr(model, "hf_device_map", None) or {"": model.device}
    names = {f"cuda:{d}" if isinstance(d, int) else str(d) for d in device_map.values()}
    return sorted(names)
