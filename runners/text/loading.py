"""From a loaded Hugging Face model to the program that serves it: the part all engines share."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec
from transformers import GenerationConfig, PreTrainedModel

from runners.config.base import TextConfig
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.hf.models import (
    SamplingDefaults,
    context_length,
    devices,
    eos_ids,
    load_tokenizer,
    sampling_defaults,
    warn_about_ignored,
)
from runners.rank.program import RankContext
from runners.text.cpu import switch_off_kernels
from runners.text.engine import Engine, RaggedEngine
from runners.text.forward import Forward
from runners.text.lockstep import Follower, Leader, Ranks
from runners.text.memory import default_kv_tokens
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.parity import Proof, prove_and_pack
from runners.text.program import TextProgram
from runners.text.scheduler import Limits
from runners.text.tokenization import PromptTokenizer

logger = logging.getLogger("triptych.ragged")


def text_program(
    context: RankContext,
    model: PreTrainedModel,
    *,
    proof: Proof | None = None,
    ranks: Ranks | None = None,
    max_total_tokens: int | None = None,
    defaults: SamplingDefaults | None = None,
) -> TextProgram | Follower:
    """Wrap a placed model: prove its batching, measure its KV, read its tokenizer and defaults.

    `ranks` hold the model together, of which `proof` was made before it was split;
    `max_total_tokens` bounds prompt plus output where the context is longer; `defaults` as in
    `serve`. Raises: ConfigError if the model cannot be served correctly.
    """
    config = context.config
    assert isinstance(config, TextConfig)  # noqa: S101 - the engines checked it
    parameters = sum(p.numel() for p in model.parameters())
    context.progress(RunnerState.WARMUP, "comparing batched steps with the model's own forward")
    batched = batch(model, config, proof=proof, ranks=ranks)
    info = ModelInfo(
        architecture=type(model).__name__,
        engine=config.engine,
        parameters=parameters,
        dtype=str(model.dtype).removeprefix("torch."),
        devices=devices(model),
        max_context=min(batched.max_context, max_total_tokens or batched.max_context),
        vocab_size=batched.forward.vocab_size,
        max_kv_tokens=batched.blocks * BLOCK_SIZE,
        has_chat_template=False,
    )
    if ranks is not None and not ranks.leads:
        return Follower(batched.forward, ranks, info)
    engine = batched.engine(ranks)
    return serve(context, engine, info, generation=model.generation_config, defaults=defaults)


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
    config: TextConfig,
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
    kv_tokens = config.max_kv_tokens or default_kv_tokens(
        model, path, useful, sharing=config.local_world_size
    )
    if ranks is not None:
        kv_tokens = ranks.smallest(kv_tokens)
    blocks = max(1, kv_tokens // BLOCK_SIZE)
    return Batched(Forward(model, path, blocks=blocks), blocks, max_context, config.prefix_caching)


def serve(
    context: RankContext,
    engine: Engine,
    info: ModelInfo,
    *,
    generation: GenerationConfig | None,
    defaults: SamplingDefaults | None = None,
) -> TextProgram:
    """The program that schedules on an engine, with the model's tokenizer and defaults.

    `defaults`: those of the operator's config in place of the generation config's. Fills in what
    `info` says about the tokenizer and the defaults.
    """
    config = context.config
    assert isinstance(config, TextConfig)  # noqa: S101 - the engines checked it
    defaults = defaults or sampling_defaults(generation)
    tokenizer = load_tokenizer(config.model_path)
    warn_about_ignored(generation)
    return TextProgram(
        info=msgspec.structs.replace(
            info,
            has_chat_template=bool(tokenizer.chat_template),
            default_temperature=defaults.temperature,
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
