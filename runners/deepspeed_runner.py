"""The DeepSpeed engine: a model split over ranks by `deepspeed.init_inference`.

Which way of splitting serves a model rightly is proved at its start: rank 0 computes the logits of
a short prompt with the whole model, and the split one has to give the same. DeepSpeed's AutoTP is
tried first, then transformers' own `tp_plan`; a model that neither splits rightly is refused.
Imported in rank processes only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from runners.config import DeepSpeedConfig
from runners.contracts import RunnerState
from runners.deepspeed_config import for_init_inference
from runners.deepspeed_layers import plain_splits
from runners.errors import ConfigError, IncompleteModel
from runners.ragged.loading import choose_dtype, loading_of, stored_dtype, text_program
from runners.ragged.lockstep import Ranks
from runners.ragged.proof import Proof
from runners.ranks.process_group import RankGroups, connect
from runners.ranks.worker import RankContext, RankProgram

logger = logging.getLogger("triptych.deepspeed")


def load_program(context: RankContext) -> RankProgram:
    """The rank program of a text model on DeepSpeed. Raises: ConfigError."""
    config = context.config
    if not isinstance(config, DeepSpeedConfig):
        raise ConfigError(f"the DeepSpeed engine was given a config for {config.engine}")
    torch.set_num_threads(context.num_threads)
    groups = connect(timeout=max(config.start_timeout, config.step_timeout))
    ranks = Ranks(groups.control)
    model, proof = load_split(
        config, groups, ranks, lambda detail: context.progress(RunnerState.LOADING, detail)
    )
    return text_program(context, model, proof=proof, ranks=ranks)


def load_split(
    config: DeepSpeedConfig, groups: RankGroups, ranks: Ranks, progress: Callable[[str], None]
) -> tuple[PreTrainedModel, Proof]:
    """This rank's share of the model, and the logits that all shares together have to give.

    Raises: ConfigError if no way of splitting is right; IncompleteModel.
    """
    with loading_of(config.name):
        own = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    _check_heads(own, config)
    progress(f"loading weights from {config.name}")
    model = _load(config, own, groups)
    progress("computing a short prompt with the whole model")
    proof = Proof(model, ranks)
    if config.world_size > 1:
        progress(f"splitting it over {config.world_size} ranks")
        model = _split(model, proof, config, own, groups)
        proof = proof.of(model)
    return model, proof


def _check_heads(own: PreTrainedConfig, config: DeepSpeedConfig) -> None:
    """Raises: ConfigError if the attention heads can not be dealt out evenly."""
    heads = getattr(own.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % config.world_size:
        raise ConfigError(
            f"{config.name} has {heads} attention heads, which tensor_parallel "
            f"{config.world_size} does not divide"
        )


def _load(
    config: DeepSpeedConfig, own: PreTrainedConfig, groups: RankGroups, **options: Any
) -> PreTrainedModel:
    """The model on the CPU, its weights mapped from their files: what a rank does not keep of it
    was never in its own memory. Raises: ConfigError, IncompleteModel."""
    stored = stored_dtype(own, config.model_path)
    on_cpu = groups.device.type == "cpu"
    with loading_of(config.name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.model_path,
            config=own,
            dtype=choose_dtype(config.computed_in(on_cpu=on_cpu), stored, on_cpu=on_cpu),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise IncompleteModel(
            f"{config.name} lacks {len(missing)} of the weights that "
            f"{type(model).__name__} needs, such as {', '.join(missing[:3])}"
        )
    return cast(PreTrainedModel, model)


def _split(
    model: PreTrainedModel,
    proof: Proof,
    config: DeepSpeedConfig,
    own: PreTrainedConfig,
    groups: RankGroups,
) -> PreTrainedModel:
    """This rank's share of the model. Raises: ConfigError if no way of splitting is right."""
    ways: dict[str, Callable[[], PreTrainedModel]] = {
        "DeepSpeed's AutoTP": lambda: _auto_tp(model, config, groups),
        "transformers' tp_plan": lambda: _load(config, own, groups, tp_plan="auto"),
    }
    reasons = []
    for name, split in ways.items():
        candidate, failure = model, None
        try:
            candidate = split()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a library trips over, this way is none
            failure = error
        if proof.agree(failure is None, failure):
            if proof.of(candidate).batches():
                logger.info("%s is split by %s", config.name, name)
                return candidate
            reasons.append(f"{name}: its logits are not those of the whole model")
        else:
            reasons.append(f"{name}: {_sentence(failure)}")
    raise ConfigError(
        f"{type(model).__name__} can not be split over {config.world_size} ranks "
        f"({'; '.join(reasons)}); serve it with engine accelerate, whose device_map places whole "
        "layers on several GPUs"
    )


def _sentence(failure: Exception | None) -> str:
    if failure is None:
        return "it failed on another rank"
    return str(failure).strip().split("\n")[0] or type(failure).__name__


def _auto_tp(
    model: PreTrainedModel, config: DeepSpeedConfig, groups: RankGroups
) -> PreTrainedModel:
    deepspeed = _deepspeed(groups)
    on_cpu = groups.device.type == "cpu"
    size = getattr(model.config.get_text_config(), "hidden_size", 0)
    options = for_init_inference(
        config.deepspeed,
        world_size=config.world_size,
        # Narrower parts than DeepSpeed's grain would leave some ranks with none.
        grain=64 if size >= 64 * config.world_size else 1,
        on_cpu=on_cpu,
    )
    engine = deepspeed.init_inference(model, config=options | {"dtype": model.dtype})
    split: PreTrainedModel = engine.module
    plain_splits(split)
    return split


def _deepspeed(groups: RankGroups) -> Any:  # carries no types
    """DeepSpeed, connected to the group that exists."""
    os.environ.setdefault("DS_ACCELERATOR", groups.device.type)
    # Its launcher would set it; without, a CPU counts its NUMA nodes as devices.
    os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    import deepspeed

    # Built at the first start for a minute, and a build that is killed leaves a lock behind on
    # which every later start waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if groups.device.type == "cuda" else "gloo")
    return deepspeed
