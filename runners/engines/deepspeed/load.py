"""The DeepSpeed engine: `deepspeed.init_inference` splits a model over ranks.

Rank 0 computes the logits of short prompts with the whole model before it is split, and the split
model must give the same logits. DeepSpeed's AutoTP is tried first, then transformers' own
`tp_plan`; a model that neither splits correctly is refused. Imported in rank processes only.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.inference.engine import InferenceEngine
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from runners.config.deepspeed import asks_for_kernels, for_init_inference
from runners.config.model import DeepSpeedTextConfig
from runners.contracts.errors import ConfigError, IncompleteModel, first_line
from runners.contracts.runner import RunnerState
from runners.engines.deepspeed.layers import replace_split_layers
from runners.engines.deepspeed.shm import OPERATOR, all_reduce, shared_memory
from runners.hf.dtypes import choose_dtype, compute_in_float32
from runners.hf.models import loading
from runners.protocol.process import give_back_memory
from runners.rank.process_group import RankGroups, connect, meet
from runners.rank.program import RankContext, RankProgram
from runners.text.loading import program_for_model
from runners.text.lockstep import TPGroup, is_rank_loss
from runners.text.parity import ParityCheck

logger = logging.getLogger("triptych.deepspeed")


def load_program(context: RankContext) -> RankProgram:
    """The rank program of a text model on DeepSpeed. Raises: ConfigError."""
    config = context.config
    assert isinstance(config, DeepSpeedTextConfig)  # noqa: S101 - `create_runner` chose this engine
    torch.set_num_threads(context.num_threads)
    groups = connect(config, meet(context))
    group = TPGroup(groups.control)
    model, parity = load_split(
        config, groups, group, lambda detail: context.progress(RunnerState.LOADING, detail)
    )
    return program_for_model(context, model, parity=parity, group=group)


def load_split(
    config: DeepSpeedTextConfig, groups: RankGroups, group: TPGroup, progress: Callable[[str], None]
) -> tuple[PreTrainedModel, ParityCheck]:
    """This rank's share of a model, and the parity made of the whole model.

    `progress`: takes a sentence at each phase. Raises: ConfigError if the model cannot be split;
    IncompleteModel.
    """
    with loading(config.name):
        model_config = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    _check_heads(model_config, config)
    progress(f"loading weights from {config.name}")
    splitter = ModelSplitter(config, model_config, groups)
    model = splitter.load()
    progress("computing reference logits with the whole model")
    parity = ParityCheck(model, group)
    if config.world_size > 1 or splitter.uses_kernels:
        progress(f"splitting the model over {config.world_size} ranks")
        model = splitter.split(model, parity)
        parity = parity.for_model(model)
    return model.to(groups.device), parity  # type: ignore[arg-type]


def _check_heads(model_config: PreTrainedConfig, config: DeepSpeedTextConfig) -> None:
    """Raises: ConfigError if the attention heads cannot be spread evenly over the ranks."""
    text = model_config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads % config.world_size:
        raise ConfigError(
            f"{config.name} has {heads} attention heads, which tensor_parallel "
            f"{config.world_size} does not divide"
        )
    kv_heads = getattr(text, "num_key_value_heads", None)
    if isinstance(kv_heads, int) and kv_heads < config.world_size:
        raise ConfigError(
            f"{config.name} has {kv_heads} key-value heads (num_key_value_heads), fewer than "
            f"tensor_parallel, which is {config.world_size}: a rank would have none; engine "
            "accelerate places whole layers on several GPUs"
        )


@dataclass(frozen=True)
class ModelSplitter:
    """Loads a model and keeps this rank's share of it."""

    config: DeepSpeedTextConfig
    model_config: PreTrainedConfig
    groups: RankGroups

    @property
    def _on_cpu(self) -> bool:
        return self.groups.device.type == "cpu"

    @property
    def _uses_shared_memory(self) -> bool:
        return self._on_cpu and self.config.shm_collectives

    @property
    def uses_kernels(self) -> bool:
        """Whether the config requests DeepSpeed's kernels, which exist for GPUs only."""
        return not self._on_cpu and asks_for_kernels(self.config.deepspeed)

    def load(self, **options: Any) -> PreTrainedModel:
        """The whole model on the CPU. Raises: ConfigError, IncompleteModel.

        The weights are mapped from their files, so that a rank's memory never holds the weights
        that the rank does not keep. `options`: for `from_pretrained`.
        """
        config = self.config
        with loading(config.name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.model_path,
                config=self.model_config,
                dtype=choose_dtype(config.chosen_dtype, config.model_path, on_cpu=self._on_cpu),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        model, report = loaded
        if missing := report["missing_keys"]:
            raise IncompleteModel.missing_weights(config.name, type(model), missing)
        if self._on_cpu:
            compute_in_float32(model)
        return cast(PreTrainedModel, model)

    def split(self, model: PreTrainedModel, parity: ParityCheck) -> PreTrainedModel:
        """This rank's share of the model. Raises: ConfigError if no method splits it correctly."""
        self._connect_deepspeed()
        methods: dict[str, Callable[[], PreTrainedModel]] = {
            "DeepSpeed's AutoTP": lambda: self._auto_tp(model),
            "transformers' tp_plan": lambda: self.load(tp_plan="auto"),
        }
        if self.uses_kernels:
            kernels = {
                "DeepSpeed's kernels": lambda: self._auto_tp(self.load(), inject_kernels=True)
            }
            methods = kernels | methods
        failures = []
        for name, method in methods.items():
            candidate, failure = self._split_by(method, model, parity)
            if failure is None:
                logger.info("%s is split by %s", self.config.name, name)
                return candidate
            failures.append(f"{name}: {failure}")
            # The next method needs the memory, whatever still refers to this candidate.
            candidate.to("meta")  # type: ignore[arg-type]
            gc.collect()
            torch.cuda.empty_cache()
        raise ConfigError(
            f"{type(model).__name__} cannot be split over {self.config.world_size} ranks "
            f"({'; '.join(failures)}); serve it with engine accelerate, whose device_map places "
            "whole layers on several GPUs"
        )

    def _split_by(
        self, method: Callable[[], PreTrainedModel], model: PreTrainedModel, parity: ParityCheck
    ) -> tuple[PreTrainedModel, str | None]:
        """What a method makes of the model, and why that cannot be used: None if it can."""
        candidate, failure = model, None
        try:
            candidate = method()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a library raises, another method may work
            if is_rank_loss(error):
                raise
            failure = error
        if not parity.all_ranks(failure is None, failure):
            return candidate, first_line(failure) if failure else "it failed on another rank"
        if parity.for_model(candidate).find_layout() is None:
            return candidate, "its logits differ from those of the whole model"
        return candidate, None

    def _auto_tp(self, model: PreTrainedModel, *, inject_kernels: bool = False) -> PreTrainedModel:
        size = getattr(model.config.get_text_config(), "hidden_size", 0)
        options = for_init_inference(
            self.config.deepspeed,
            world_size=self.config.world_size,
            # With DeepSpeed's default grain, some ranks of a narrow model would get no weights.
            grain=64 if size >= 64 * self.config.world_size else 1,
            inject=inject_kernels,
        )
        with _types_kept() if self._on_cpu else nullcontext():
            engine = deepspeed.init_inference(model, config=options | {"dtype": model.dtype})
        share: PreTrainedModel = engine.module
        del engine
        replace_split_layers(share, all_reduce if self._uses_shared_memory else dist.all_reduce)
        # DeepSpeed's layers are in reference cycles. Their weights must be freed before the weights
        # are packed for the CPU kernels: there is no memory for both.
        gc.collect()
        give_back_memory()
        if self._on_cpu:
            compute_in_float32(share)
        return share

    def _connect_deepspeed(self) -> None:
        deepspeed.ops.__compatible_ops__[OPERATOR] = False
        with shared_memory() if self._uses_shared_memory else nullcontext():
            deepspeed.init_distributed(dist_backend="gloo" if self._on_cpu else "nccl")


@contextmanager
def _types_kept() -> Iterator[None]:
    """Keep DeepSpeed from casting the whole model to its dtype before it is split."""
    convert = InferenceEngine._convert_to_dtype
    InferenceEngine._convert_to_dtype = lambda *_: None
    try:
        yield
    finally:
        InferenceEngine._convert_to_dtype = convert
