"""A model's engine in this process, driven through the scheduler as rank 0 drives it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.device import Device

Prompts = Sequence[Sequence[int]]


@dataclass
class Output:
    """What was generated for one prompt."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, ...]] = field(default_factory=list)
    """Of each token: its own, then those of the most likely ones; empty unless requested."""
    times: list[float] = field(default_factory=list)
    """When each token was emitted, by `time.perf_counter`."""
    error: str | None = None


def supported(**options: Any) -> dict[str, Any]:
    """Those of the options that a TextConfig of this version has."""
    from runners.config.base import TextConfig

    return {key: value for key, value in options.items() if key in TextConfig.model_fields}


def config_for(device: Device, folder: Path, **options: Any) -> Any:
    """The config of a text model on the Accelerate engine.

    A dry run takes the path of a GPU on tensors of the CPU.
    """
    from runners.config.model import validate

    devices = {"device_map": device.pick("cuda:0", "cpu")}
    if device.dry:
        devices |= supported(attention_kernel="torch", num_threads=1)
    values = {"engine": "accelerate", "name": folder.name, "model_path": folder}
    return validate(values | devices | supported(**options))


@cache
def tokenizer() -> Any:
    """The tokenizer that all models of the check have."""
    from transformers import AutoTokenizer

    from tests.support.models import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return AutoTokenizer.from_pretrained(folder)


class Session:
    """A prepared model and its scheduler.

    `model` is a loaded model; by default it is loaded from `folder`. `options` are fields of
    TextConfig, without those that this version does not have.
    """

    def __init__(self, device: Device, folder: Path, *, model: Any = None, **options: Any) -> None:
        from runners.engines.accelerate import load_model
        from runners.text.loading import prepare_model
        from runners.text.scheduler import Limits, Scheduler

        config = self._config = config_for(device, folder, **options)
        if model is None:
            with tempfile.TemporaryDirectory() as work_dir:
                model = load_model(config, Path(work_dir))
        self._device = device
        self._outputs: dict[str, Output] = {}
        prepared = prepare_model(model, config)
        self.engine: Any = prepared.create_engine()
        self.scheduler = Scheduler(
            self.engine,
            Limits(config.max_batch_size, config.max_step_tokens),
            emit=self._emit,
            fail=self._fail,
            describe=lambda _: ("", b""),
        )

    @property
    def invariance(self) -> str:
        """The setting, and what it has done to this process."""
        from runners.text.gpu.invariance import installed

        setting = str(getattr(self._config, "batch_invariant", None)).lower()
        owner = "Triptych" if installed(self._device.target.type) else "torch"
        return f"batch_invariant {setting}, operators of {owner}"

    def generate(
        self, prompts: Prompts, count: int, *, logprobs: int | None = None
    ) -> list[Output]:
        """`count` greedy tokens of each prompt, all submitted at once."""
        from runners.contracts.text import SamplingParams
        from runners.hf.models import SamplingDefaults
        from runners.text.detokenizer import Detokenizer
        from runners.text.sampling import SamplerState
        from runners.text.scheduler import Sequence as Scheduled

        names = [f"{len(self._outputs) + i}" for i in range(len(prompts))]
        params = SamplingParams(temperature=0.0, logprobs=logprobs)
        for name, prompt in zip(names, prompts, strict=True):
            self._outputs[name] = Output()
            self.scheduler.add(
                Scheduled(
                    request_id=name,
                    prompt_ids=list(prompt),
                    max_new_tokens=count,
                    eos_ids=frozenset(),
                    sampler=SamplerState(params, SamplingDefaults(), prompt, frozenset()),
                    detokenizer=Detokenizer(tokenizer()),
                )
            )
        while self.scheduler.busy:
            self.scheduler.step()
        return [self._outputs[name] for name in names]

    def _emit(self, deltas: Any) -> None:
        now = time.perf_counter()
        for delta in deltas:
            output = self._outputs[delta.request_id]
            output.tokens += delta.token_ids
            output.times += [now] * len(delta.token_ids)
            for entry in delta.logprobs or ():
                output.logprobs.append((entry.logprob, *(top.logprob for top in entry.top)))

    def _fail(self, request_id: str, error: Exception) -> None:
        self._outputs[request_id].error = f"{type(error).__name__}: {error}"
