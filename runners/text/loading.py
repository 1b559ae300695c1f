"""From a loaded model to the rank program that serves it: what all engines have in common.

The engines call this in every rank of a text model.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from transformers import GenerationConfig, PreTrainedModel

from runners.config.base import TextConfig
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.hf.dtypes import log_dtypes, weight_dtype
from runners.hf.models import (
    SamplingDefaults,
    context_length,
    devices,
    end_token_ids,
    load_tokenizer,
    sampling_defaults,
    warn_about_ignored,
)
from runners.protocol.process import give_back_memory
from runners.rank.program import RankContext
from runners.text.cpu import switch_off_kernels
from runners.text.engine import Engine, PagedEngine
from runners.text.execution import Execution, GPUExecution, SizedRunner, choose_execution
from runners.text.gpu.invariance import log_batch_dependence
from runners.text.gpu.kernels import compiled_for
from runners.text.lockstep import Follower, Leader, TPGroup
from runners.text.memory import first_steps, kv_tokens, release_cache
from runners.text.model_runner import input_device
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.parity import ParityCheck, check_and_pack, choose_gpu_kernels
from runners.text.program import TextProgram
from runners.text.scheduler import Limits
from runners.text.tokenization import PromptTokenizer
from runners.text.tokenizer_process import start_fork_server


def program_for_model(
    context: RankContext,
    model: PreTrainedModel,
    *,
    parity: ParityCheck | None = None,
    group: TPGroup | None = None,
    max_total_tokens: int | None = None,
    defaults: SamplingDefaults | None = None,
) -> TextProgram | Follower:
    """The program of this rank for a model that is on its devices.

    `group` has the ranks that the model is split over, `parity` is the check from before it was
    split. `max_total_tokens` bounds prompt plus output of a longer context; `defaults` as in
    `program_for_engine`. Raises: ConfigError if the model cannot be served correctly.
    """
    config = context.config
    assert isinstance(config, TextConfig)  # noqa: S101 - the engines checked it
    if group is None or group.is_leader:
        start_fork_server()  # it imports its modules during the check below
    parameters = sum(p.numel() for p in model.parameters())
    dtype = str(weight_dtype(model)) if config.dtype == "auto" else config.dtype
    context.progress(RunnerState.WARMUP, "comparing batched steps with the model's plain forward")
    batched = prepare_model(model, config, parity=parity, group=group)
    info = ModelInfo(
        architecture=type(model).__name__,
        engine=config.engine,
        parameters=parameters,
        dtype=dtype.removeprefix("torch."),
        devices=devices(model),
        max_context=min(batched.max_context, max_total_tokens or batched.max_context),
        vocab_size=batched.runner.vocab_size,
        max_kv_tokens=batched.blocks * BLOCK_SIZE,
        has_chat_template=False,
    )
    if group is not None and not group.is_leader:
        return Follower(batched.runner, group, info)
    engine = batched.create_engine(group)
    return program_for_engine(
        context, engine, info, generation_config=model.generation_config, defaults=defaults
    )


@dataclass(frozen=True)
class BatchedModel:
    """A model in its layout, and the size of its KV cache."""

    execution: Execution
    runner: SizedRunner
    blocks: int
    """Number of KV blocks."""
    max_context: int
    """Longest prompt plus output, in tokens."""
    prefix_caching: bool

    def create_engine(self, group: TPGroup | None = None) -> PagedEngine:
        """An engine over the model; with `group`, that of rank 0, whose batches all ranks run."""
        return PagedEngine(
            self.runner if group is None else Leader(self.runner, group),
            self.execution.sampler(),
            blocks=self.blocks,
            prefix_caching=self.prefix_caching,
            overlap=self.execution.overlap,
        )


def prepare_model(
    model: PreTrainedModel,
    config: TextConfig,
    *,
    parity: ParityCheck | None = None,
    group: TPGroup | None = None,
) -> BatchedModel:
    """Choose a model's layout and kernels, and size its KV; arguments as in `program_for_model`.

    Raises: ConfigError if the model cannot be served correctly.
    """
    if not config.cpu_kernels:
        switch_off_kernels()
    max_context = context_length(model.config)
    execution: Execution = choose_execution(model, config, max_context=max_context, group=group)
    if isinstance(execution, GPUExecution):
        if config.weight_quantization is not None:
            raise ConfigError("is for models on a CPU", field="weight_quantization")
        layout, execution = choose_gpu_kernels(model, execution, config, parity)
        if config.batch_invariant and compiled_for(input_device(model)):
            log_batch_dependence(
                config.name,
                execution.limits,
                lambda blocks: execution.runner(model, layout, blocks=blocks),
            )
        release_cache()
    else:
        layout = check_and_pack(model, config.weight_quantization, parity)
    give_back_memory()
    log_dtypes(config.name, model)
    tokens = kv_tokens(model, layout, config, max_context=max_context, execution=execution)
    if group is not None:
        tokens = group.all_reduce_min(tokens)
    blocks = max(1, tokens // BLOCK_SIZE)
    runner = execution.runner(model, layout, blocks=blocks, graphs=True)
    if isinstance(execution, GPUExecution):
        # Allocates the KV cache and captures a graph, so that no request has to wait for it.
        runner.run(first_steps(1, 1))
        runner.idle()
    return BatchedModel(execution, runner, blocks, max_context, config.prefix_caching)


def program_for_engine(
    context: RankContext,
    engine: Engine,
    info: ModelInfo,
    *,
    generation_config: GenerationConfig | None,
    defaults: SamplingDefaults | None = None,
) -> TextProgram:
    """The program of rank 0 that schedules on an engine, with the tokenizer of the model folder.

    `info` lacks what depends on the tokenizer and the defaults, which is added here. `defaults`
    replace those of the generation config. Raises: ConfigError if the tokenizer cannot be loaded.
    """
    config = context.config
    assert isinstance(config, TextConfig)  # noqa: S101 - the engines checked it
    defaults = defaults or sampling_defaults(generation_config)
    tokenizer = load_tokenizer(config.model_path)
    warn_about_ignored(generation_config)
    return TextProgram(
        info=msgspec.structs.replace(
            info,
            has_chat_template=bool(tokenizer.chat_template),
            default_temperature=defaults.temperature,
        ),
        engine=engine,
        tokenizer=PromptTokenizer(tokenizer, info.vocab_size, max_tokens=info.max_model_len),
        limits=Limits(config.max_batch_size, config.max_step_tokens),
        eos_ids=end_token_ids(generation_config, tokenizer, info.vocab_size),
        defaults=defaults,
        max_prompt_tokens=config.max_length,
        default_new_tokens=config.max_new_tokens,
        emit=context.emit,
    )
