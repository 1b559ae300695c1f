"""From a loaded Hugging Face model to the program that serves it: the part all engines share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from runners.contracts import ModelInfo, RunnerState
from runners.errors import ConfigError
from runners.ragged.engine import RaggedEngine
from runners.ragged.program import TextProgram
from runners.ragged.sampling import SamplingDefaults
from runners.ragged.scheduler import Limits
from runners.ragged.tokenization import PromptTokenizer
from runners.ranks.worker import RankContext

# Nobody watches a bar in a server's log; `Progress` messages tell what is going on.
disable_progress_bar()  # type: ignore[no-untyped-call]

KV_SHARE = 0.6
"""Share of the free memory that KV may take by default; the rest is for activations and others."""


def choose_dtype(wanted: str, model_config: PreTrainedConfig) -> torch.dtype | str:
    """The dtype to load in. On a CPU `auto` is float32 unless it computes half precision natively:
    elsewhere torch's half-precision matmul is two orders of magnitude slower."""
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    stored = getattr(model_config, "dtype", None)
    instruction = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}.get(
        cast(Any, stored)
    )
    if instruction is None or torch.cuda.is_available():
        return "auto"
    return "auto" if torch.cpu.get_capabilities().get(instruction) else torch.float32


def text_program(context: RankContext, model: PreTrainedModel) -> TextProgram:
    """Wrap a placed model: prove its batching, measure its KV, read its tokenizer and defaults.

    Raises: ConfigError if the model can not be served rightly.
    """
    config = context.config
    context.progress(RunnerState.WARMUP, "comparing batched steps with the model's own forward")
    engine = RaggedEngine(model)
    tokenizer = _load_tokenizer(config.model_path)
    max_context = _max_context(model.config)
    limits = Limits(
        max_batch_size=config.max_batch_size,
        max_step_tokens=config.max_step_tokens,
        max_kv_tokens=config.max_kv_tokens
        or _default_kv_tokens(engine, config.max_batch_size * max_context),
    )
    info = ModelInfo(
        architecture=type(model).__name__,
        engine=config.engine,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        devices=_devices(model),
        max_context=max_context,
        vocab_size=engine.vocab_size,
        max_kv_tokens=limits.max_kv_tokens,
        has_chat_template=bool(tokenizer.chat_template),
        default_temperature=_defaults(model).temperature or None,
    )
    return TextProgram(
        info=info,
        engine=engine,
        tokenizer=PromptTokenizer(tokenizer, engine.vocab_size),
        limits=limits,
        eos_ids=_eos_ids(model),
        defaults=_defaults(model),
        max_prompt_tokens=config.max_length,
        emit=context.emit,
    )


def _load_tokenizer(path: Path) -> Any:  # AutoTokenizer's class is only known at run time
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the tokenizer of {path.name} can not be loaded: {error}") from error


def _max_context(config: PreTrainedConfig) -> int:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return 2048  # ALiBi models name no limit; this is what they were usually trained on


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _defaults(model: PreTrainedModel) -> SamplingDefaults:
    """The model's generation config where it says something, as vLLM and transformers do."""
    own = model.generation_config
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


def _default_kv_tokens(engine: RaggedEngine, useful: int) -> int:
    """As many tokens as the free memory of the tightest device holds, at most `useful`."""
    engine.reserve(-1, 1)
    engine.put([-1], [[0]])
    per_token = engine.bytes_per_token(-1)
    engine.flush(-1)
    room = [int(KV_SHARE * _free_bytes(d) / size) for d, size in per_token.items() if size]
    fits = min([useful, *room])
    if fits < 16:
        raise ConfigError("no memory is left for the KV cache; choose a smaller model or dtype")
    return fits


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if _linux() else []:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min([free, *_cgroup_room()])


def _cgroup_room() -> list[int]:
    """What a container's memory limit leaves (cgroup v2); empty without a limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return []
    return [] if limit == "max" else [max(0, int(limit) - int(used))]


def _linux() -> bool:
    return Path("/proc/meminfo").is_file()


def _devices(model: PreTrainedModel) -> list[str]:
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    names = {f"cuda:{d}" if isinstance(d, int) else str(d) for d in placed.values()}
    return sorted(names)
