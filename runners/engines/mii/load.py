"""The MII engine: DeepSpeed-MII in our ranks (`pipeline`), or a deployment of it (`persistent`).

In mode `pipeline` MII loads the model in our ranks and our scheduler drives it: FastGen's engine on
CUDA (`fastgen`), on a CPU our own. In mode `persistent` this rank starts, or finds, the deployment
that `mii.serve` would start, and passes requests on (`persistent`). Imported in ranks only.
"""

from __future__ import annotations

import torch

from runners.config.model import MIITextConfig
from runners.contracts.runner import RunnerState
from runners.engines.mii.defaults import mii_defaults
from runners.rank.process_group import meet
from runners.rank.program import RankContext, RankProgram
from runners.text.loading import program_for_model


def load_program(context: RankContext) -> RankProgram:
    """The rank program of a text model on MII. Raises: ConfigError."""
    config = context.config
    assert isinstance(config, MIITextConfig)  # noqa: S101 - `create_runner` chose this engine
    torch.set_num_threads(context.num_threads)
    if config.mii.mode == "persistent":
        # gRPC, which mode `pipeline` does without.
        from runners.engines.mii.persistent import load_persistent

        return load_persistent(context, config)
    context.progress(RunnerState.LOADING, "importing DeepSpeed-MII")
    # Importing the patches imports MII and DeepSpeed, which takes seconds.
    from runners.engines.mii.patches import loading

    if loading.on_gpu():
        from runners.engines.mii.fastgen import load_fastgen

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
