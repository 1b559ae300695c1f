"""From a loaded Hugging Face model to the program that serves it: the part all engines share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from runners.config import BaseRunnerConfig
from runners.contracts import ModelInfo, RunnerState
from runners.dtypes import dtype_in
from runners.errors import ConfigError
from runners.ragged.blocks import BLOCK_SIZE
from runners.ragged.cpu import switch_off_kernels
from runners.ragged.engine import Engine, RaggedEngine
from runners.ragged.forward import Batching, Forward
from runners.ragged.lockstep import Follower, Leader, Ranks
from runners.ragged.program import TextProgram
from runners.ragged.proof import Proof, prove_and_pack
from runners.ragged.sampling import SamplingDefaults
from runners.ragged.scheduler import Limits
from runners.ragged.step import StepPlan
from runners.ragged.tokenization import PromptTokenizer
from runners.ranks.worker import RankContext

logger = logging.getLogger("triptych.ragged")

# Nobody watches a bar in a server's log; `Progress` messages tell what is going on.
disable_progress_bar()  # type: ignore[no-untyped-call]

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

KV_SHARE = 0.6
"""Share of the free memory that KV may take by default; the rest is for activations and others."""


def stored_dtype(config: PreTrainedConfig, folder: Path) -> torch.dtype | None:
    """The dtype of the weights: as the config says, else that of the first floating tensor."""
    if isinstance(said := getattr(config, "dtype", None), torch.dtype):
        return said
    files = sorted(folder.glob("*.safetensors"))
    return dtype_in(files[0]) if files else None


def text_program(
    context: RankContext,
    model: PreTrainedModel,
    *,
    proof: Proof | None = None,
    ranks: Ranks | None = None,
    longest: int | None = None,
) -> TextProgram | Follower:
    """Wrap a placed model: prove its batching, measure its KV, read its tokenizer and defaults.

    `ranks` hold the model together, of which `proof` was made before it was split; `longest` bounds
    prompt plus output where the context is longer.
    Raises: ConfigError if the model can not be served rightly.
    """
    config = context.config
    parameters = sum(p.numel() for p in model.parameters())
    context.progress(RunnerState.WARMUP, "comparing batched steps with the model's own forward")
    batched = batch(model, config, proof=proof, ranks=ranks)
    info = ModelInfo(
        architecture=type(model).__name__,
        engine=config.engine,
        parameters=parameters,
        dtype=str(model.dtype).removeprefix("torch."),
        devices=devices(model),
        max_context=min(batched.max_context, longest or batched.max_context),
        vocab_size=batched.forward.vocab_size,
        max_kv_tokens=batched.blocks * BLOCK_SIZE,
        has_chat_template=False,
    )
    if ranks is not None and not ranks.leads:
        return Follower(batched.forward, ranks, info)
    return serve(context, batched.engine(ranks), info, model.generation_config)


@dataclass(frozen=True)
class Batched:
    """A model that runs in batches of steps."""

    forward: Forward
    blocks: int
    """Blocks of KV."""
    max_context: int
    """Longest prompt plus output, in tokens."""
    prefix_caching: bool

    def engine(self, ranks: Ranks | None = None) -> RaggedEngine:
        """The engine over it; with `ranks`, rank 0's, which the others follow."""
        return RaggedEngine(
            self.forward if ranks is None else Leader(self.forward, ranks),
            blocks=self.blocks,
            prefix_caching=self.prefix_caching,
        )


def batch(
    model: PreTrainedModel,
    config: BaseRunnerConfig,
    *,
    proof: Proof | None = None,
    ranks: Ranks | None = None,
) -> Batched:
    """Prove how a placed model can be batched, and measure its KV; see `text_program`.

    Raises: ConfigError if the model can not be served rightly.
    """
    if not config.cpu_kernels:
        switch_off_kernels()
    path = prove_and_pack(model, config.weight_quantization, proof)
    max_context = context_length(model.config)
    useful = config.max_batch_size * max_context
    kv_tokens = config.max_kv_tokens or _default_kv_tokens(
        model, path, useful, sharing=config.local_world_size
    )
    if ranks is not None:
        kv_tokens = ranks.smallest(kv_tokens)
    blocks = max(1, kv_tokens // BLOCK_SIZE)
    return Batched(Forward(model, path, blocks=blocks), blocks, max_context, config.prefix_caching)


def serve(
    context: RankContext, engine: Engine, info: ModelInfo, generation: GenerationConfig | None
) -> TextProgram:
    """The program that schedules on an engine, with the model's tokenizer and defaults.

    What `info` says of the tokenizer and the defaults is filled in.
    """
    config = context.config
    defaults = sampling_defaults(generation)
    tokenizer = load_tokenizer(config.model_path)
    _warn_of_ignored(generation)
    return TextProgram(
        info=replace(
            info,
            has_chat_template=bool(tokenizer.chat_template),
            default_temperature=defaults.temperature or None,
        ),
        engine=engine,
        tokenizer=PromptTokenizer(tokenizer, info.vocab_size),
        limits=Limits(config.max_batch_size, config.max_step_tokens),
        eos_ids=eos_ids(generation, info.vocab_size),
        defaults=defaults,
        max_prompt_tokens=config.max_length,
        default_new_tokens=config.max_new_tokens,
        emit=context.emit,
    )


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


def _warn_of_ignored(own: GenerationConfig | None) -> None:
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


def _default_kv_tokens(model: PreTrainedModel, path: Batching, useful: int, *, sharing: int) -> int:
    """As many tokens as the free memory of the tightest device holds, at most `useful`.

    `sharing` ranks have the CPU's memory in common.
    """
    forward = Forward(model, path, blocks=1)
    forward.run(StepPlan([[0]], [0], [[0]]))
    per_token = forward.bytes_per_token()
    room = [
        int(KV_SHARE * _free_bytes(d) / (sharing if d.type == "cpu" else 1) / size)
        for d, size in per_token.items()
        if size
    ]
    fits = min([useful, *room])
    if fits < BLOCK_SIZE:
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
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = Path("/sys/fs/cgroup/memory.stat").read_text()
    except OSError:
        return []
    # The page cache of the weights counts as used, but gives way.
    cached = next(
        (int(x.split()[1]) for x in stat.splitlines() if x.startswith("inactive_file")), 0
    )
    return [] if limit == "max" else [max(0, int(limit) - used + cached)]


def _linux() -> bool:
    return Path("/proc/meminfo").is_file()


def devices(model: PreTrainedModel) -> list[str]:
    """Where the parts of a placed model lie."""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    names = {f"cuda:{d}" if isinstance(d, int) else str(d) for d in placed.values()}
    return sorted(names)
