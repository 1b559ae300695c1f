"""The DeepSpeed engine: a model split over ranks by `deepspeed.init_inference`.

Which way of splitting serves a model rightly is proved at its start: rank 0 computes the logits of
a short prompt with the whole model, and the split one has to give the same. DeepSpeed's AutoTP is
tried first, then transformers' own `tp_plan`; a model that neither splits rightly is refused.
Imported in rank processes only.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from runners.config.deepspeed import asks_for_kernels, for_init_inference
from runners.config.model import DeepSpeedTextConfig
from runners.contracts.errors import ConfigError, IncompleteModel, first_line
from runners.contracts.runner import RunnerState
from runners.engines.deepspeed.layers import plain_splits
from runners.engines.deepspeed.shm import NAME, all_reduce, shared_memory
from runners.hf.dtypes import choose_dtype
from runners.hf.models import loading, stored_dtype
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
    """This rank's share of the model, and the logits that all shares together have to give.

    Raises: ConfigError if no way of splitting is right; IncompleteModel.
    """
    with loading(config.name):
        own = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    _check_heads(own, config)
    progress(f"loading weights from {config.name}")
    splitting = Splitting(config, own, groups)
    model = splitting.load()
    progress("computing a short prompt with the whole model")
    parity = ParityCheck(model, group)
    if config.world_size > 1 or splitting.wants_kernels:
        progress(f"splitting it over {config.world_size} ranks")
        model = splitting.split(model, parity)
        parity = parity.for_model(model)
    return model.to(groups.device), parity  # type: ignore[arg-type]


def _check_heads(own: PreTrainedConfig, config: DeepSpeedTextConfig) -> None:
    """Raises: ConfigError if the attention heads can not be dealt out evenly."""
    heads = getattr(own.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % config.world_size:
        raise ConfigError(
            f"{config.name} has {heads} attention heads, which tensor_parallel "
            f"{config.world_size} does not divide"
        )


@dataclass(frozen=True)
class Splitting:
    """How one model becomes this rank's share of it."""

    config: DeepSpeedTextConfig
    own: PreTrainedConfig
    groups: RankGroups

    @property
    def _on_cpu(self) -> bool:
        return self.groups.device.type == "cpu"

    @property
    def _through_memory(self) -> bool:
        return self._on_cpu and self.config.shm_collectives

    @property
    def wants_kernels(self) -> bool:
        """Whether DeepSpeed's own kernels are asked for, and exist."""
        return not self._on_cpu and asks_for_kernels(self.config.deepspeed)

    def load(self, **options: Any) -> PreTrainedModel:
        """The model on the CPU, its weights mapped from their files: what a rank does not keep of
        it was never in its own memory. Raises: ConfigError, IncompleteModel."""
        config, on_cpu = self.config, self._on_cpu
        stored = stored_dtype(self.own, config.model_path)
        with loading(config.name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.model_path,
                config=self.own,
                dtype=choose_dtype(config.dtype_for(on_cpu=on_cpu), stored, on_cpu=on_cpu),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        model, report = loaded
        if missing := report["missing_keys"]:
            raise IncompleteModel.missing_weights(config.name, type(model), missing)
        return cast(PreTrainedModel, model)

    def split(self, model: PreTrainedModel, parity: ParityCheck) -> PreTrainedModel:
        """This rank's share of the model. Raises: ConfigError if no way of splitting is right."""
        deepspeed = self._connect_deepspeed()
        ways: dict[str, Callable[[], PreTrainedModel]] = {
            "DeepSpeed's AutoTP": lambda: self._auto_tp(deepspeed, model),
            "transformers' tp_plan": lambda: self.load(tp_plan="auto"),
        }
        if self.wants_kernels:
            kernels = {"DeepSpeed's kernels": lambda: self._auto_tp(deepspeed, self.load(), True)}
            ways = kernels | ways
        reasons = []
        for name, way in ways.items():
            candidate, reason = self._try(way, model, parity)
            if reason is None:
                logger.info("%s is split by %s", self.config.name, name)
                return candidate
            reasons.append(f"{name}: {reason}")
            # Whoever still holds it, the next way needs the room.
            candidate.to("meta")  # type: ignore[arg-type]
            gc.collect()
            torch.cuda.empty_cache()
        raise ConfigError(
            f"{type(model).__name__} can not be split over {self.config.world_size} ranks "
            f"({'; '.join(reasons)}); serve it with engine accelerate, whose device_map places "
            "whole layers on several GPUs"
        )

    def _try(
        self, way: Callable[[], PreTrainedModel], model: PreTrainedModel, parity: ParityCheck
    ) -> tuple[PreTrainedModel, str | None]:
        """What it makes of the model, and why that will not do."""
        candidate, failure = model, None
        try:
            candidate = way()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a library trips over, this way is none
            if is_rank_loss(error):
                raise
            failure = error
        if not parity.all_ranks(failure is None, failure):
            return candidate, first_line(failure) if failure else "it failed on another rank"
        if not parity.for_model(candidate).has_layout():
            return candidate, "its logits are not those of the whole model"
        return candidate, None

    def _auto_tp(
        self, deepspeed: Any, model: PreTrainedModel, inject: bool = False
    ) -> PreTrainedModel:
        size = getattr(model.config.get_text_config(), "hidden_size", 0)
        options = for_init_inference(
            self.config.deepspeed,
            world_size=self.config.world_size,
            # Narrower parts than DeepSpeed's grain would leave some ranks with none.
            grain=64 if size >= 64 * self.config.world_size else 1,
            inject=inject,
        )
        engine = deepspeed.init_inference(model, config=options | {"dtype": model.dtype})
        split: PreTrainedModel = engine.module
        del engine
        plain_splits(split, all_reduce if self._through_memory else dist.all_reduce)
        # DeepSpeed's layers hold their weights in circles, for which there is no room beside those
        # that are packed for our kernels.
        gc.collect()
        return split

    def _connect_deepspeed(self) -> Any:  # which carries no types
        os.environ.setdefault("DS_ACCELERATOR", self.groups.device.type)
        import deepspeed

        deepspeed.ops.__compatible_ops__[NAME] = False
        with shared_memory() if self._through_memory else nullcontext():
            deepspeed.init_distributed(dist_backend="gloo" if self._on_cpu else "nccl")
        return deepspeed
