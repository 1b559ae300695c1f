"""The MII engine: DeepSpeed-MII in our ranks (`pipeline`), or a deployment of it (`persistent`).

In mode `pipeline` MII loads the model in our ranks and our scheduler drives it: FastGen's engine on
CUDA (`mii_fastgen`), on a CPU the ragged engine. In mode `persistent` this rank starts, or finds,
what `mii.serve` stands up, and passes requests on (`mii_persistent`). Imported in rank processes
only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch

from runners.config.mii import GenerateSection
from runners.config.model import MIIConfig
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.contracts.text import GenerationRequest, ModelInfo, SamplingParams
from runners.protocol.messages import HostMessage, Submit
from runners.rank.program import Occupancy, RankContext, RankProgram
from runners.text.loading import text_program


def load_program(context: RankContext) -> RankProgram:
    """The rank program of a text model on MII. Raises: ConfigError."""
    config = context.config
    if not isinstance(config, MIIConfig):
        raise ConfigError(f"the MII engine was given a config for {config.engine}")
    torch.set_num_threads(context.num_threads)
    if config.mii.mode == "persistent":
        from runners.engines.mii.persistent import load_persistent

        return Defaulting(load_persistent(context, config), config.mii.generate)
    return Defaulting(_load_pipeline(context, config), config.mii.generate)


def _load_pipeline(context: RankContext, config: MIIConfig) -> RankProgram:
    context.progress(RunnerState.LOADING, "importing DeepSpeed-MII")
    from runners.engines.mii.patches import loading
    from runners.rank.process_group import meet

    if loading.on_gpu():
        from runners.engines.mii.fastgen import load_fastgen

        return load_fastgen(context, config)
    context.progress(RunnerState.LOADING, f"loading weights from {config.name}")
    model, proof, ranks = loading.load_model_on_cpu(
        config,
        lambda detail: context.progress(RunnerState.LOADING, detail),
        meet(context) if config.world_size > 1 else None,
    )
    return text_program(context, model, proof=proof, ranks=ranks, longest=config.mii.longest)


class Defaulting:
    """A program whose requests get MII's own defaults where they say nothing."""

    def __init__(self, program: RankProgram, generate: GenerateSection) -> None:
        self._program = program
        self._generate = generate
        self._temperature = _temperature(generate)

    @property
    def info(self) -> ModelInfo:
        """What was loaded, with the temperature that requests get by default."""
        info = cast(ModelInfo, self._program.info)  # MII's programs are of text
        if self._temperature is None:
            return info
        return replace(info, default_temperature=self._temperature or None)

    def receive(self, message: HostMessage) -> None:
        """Fill in a request's defaults, and hand it on."""
        if isinstance(message, Submit):
            message = Submit(self._filled(message.request))
        self._program.receive(message)

    def step(self) -> None:
        """See `RankProgram`."""
        self._program.step()

    def occupancy(self) -> Occupancy:
        """See `RankProgram`."""
        return self._program.occupancy()

    def _filled(self, request: GenerationRequest) -> GenerationRequest:
        asked, own = request.sampling, self._generate
        sampling: SamplingParams = replace(
            asked,
            temperature=self._temperature if asked.temperature is None else asked.temperature,
            top_p=own.top_p if asked.top_p is None else asked.top_p,
            top_k=own.top_k if asked.top_k is None else asked.top_k,
            min_new_tokens=asked.min_new_tokens or own.min_new_tokens,
            stop=asked.stop or own.stop,
            ignore_eos=asked.ignore_eos or own.ignore_eos,
        )
        return replace(request, sampling=sampling)


def _temperature(generate: GenerateSection) -> float | None:
    """None where MII is not told, and the model's own default holds."""
    if generate.do_sample is False:
        return 0.0
    return 1.0 if generate.do_sample and generate.temperature is None else generate.temperature
