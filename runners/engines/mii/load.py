"""The MII engine: DeepSpeed-MII in Triptych's ranks, or a deployment of it.

In mode `pipeline` the ranks hold the model and Triptych's scheduler drives it: on FastGen's engine
with CUDA (`fastgen`), on Triptych's own without. In mode `persistent` the only rank starts or finds
the deployment that `mii.serve` would start, and forwards requests to it (`persistent`). Imported in
rank processes only.
"""

from __future__ import annotations

import torch

from runners.config.model import MIITextConfig
from runners.contracts.runner import RunnerState
from runners.engines.mii.defaults import mii_defaults
from runners.engines.mii.fastgen import load_fastgen
from runners.rank.process_group import meet
from runners.rank.program import RankContext, RankProgram
from runners.text.loading import program_for_model


def load_program(context: RankContext) -> RankProgram:
    """The rank program of a text model on MII. Raises: ConfigError."""
    config = context.config
    assert isinstance(config, MIITextConfig)  # noqa: S101 - `create_runner` chose this engine
    torch.set_num_threads(context.num_threads)
    if config.mii.mode == "persistent":
        # It needs gRPC, which mode `pipeline` does not.
        from runners.engines.mii.persistent import load_persistent

        return load_persistent(context, config)
    context.progress(RunnerState.LOADING, "importing DeepSpeed-MII")
    # It imports MII and DeepSpeed, which takes seconds: the progress is reported before that.
    from runners.engines.mii.patches import loading

    if loading.on_gpu():
        return load_fastgen(context, config)
    context.progress(RunnerState.LOADING, f"loading weights from {config.name}")
    model, parity, group = loading.load_model_on_cpu(
        config,
        lambda detail: context.progress(RunnerState.LOADING, detail),
        meet(context) if config.world_size > 1 else None,
    )
    return program_for_model(
        context,
        model,
        parity=parity,
        group=group,
        max_total_tokens=config.mii.max_total_tokens,
        defaults=mii_defaults(config.mii.generate, model.generation_config),
    )
