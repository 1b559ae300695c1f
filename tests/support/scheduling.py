"""A scheduler over a real engine, in this process, and what it emitted."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from runners.config.model import AccelerateTextConfig
from runners.contracts.text import SamplingParams, TextDelta
from runners.hf.dtypes import compute_in_float32
from runners.hf.models import SamplingDefaults
from runners.text.cpu.linear import Quantization
from runners.text.detokenizer import Detokenizer
from runners.text.engine import PagedEngine
from runners.text.gpu.model_runner import GPUModelRunner
from runners.text.loading import prepare_model
from runners.text.model_runner import HFModelRunner
from runners.text.sampling import SamplerState
from runners.text.scheduler import Limits, Scheduler, Sequence
from tests.support.models import write_tokenizer

COUNT = 12


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer that all the models of `tests.support.models` have."""
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        return loaded


def load(
    folder: Path,
    *,
    kv_tokens: int = 4096,
    prefix_caching: bool = True,
    quantization: Quantization | None = None,
    **fields: Any,
) -> PagedEngine:
    """A model's engine, made as a rank makes it; `fields` of its config."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    compute_in_float32(model)
    config = AccelerateTextConfig(
        name=folder.name,
        model_path=folder,
        max_kv_tokens=kv_tokens,
        prefix_caching=prefix_caching,
        weight_quantization=quantization,
        **fields,
    )
    return prepare_model(model, config).create_engine()


def pages(folder: Path, **options: Any) -> PagedEngine:
    """As `load`, on the path of a GPU."""
    return load(folder, attention_kernel="torch", **options)


def gpu_runner(engine: PagedEngine) -> GPUModelRunner:
    """What computes the steps of an engine on the path of a GPU."""
    assert isinstance(engine.model, GPUModelRunner)
    return engine.model


def runner_of(engine: PagedEngine) -> HFModelRunner | GPUModelRunner:
    """What computes the engine's steps."""
    assert isinstance(engine.model, HFModelRunner | GPUModelRunner)
    return engine.model


def sequence(
    name: str, prompt: list[int], count: int = COUNT, params: SamplingParams | None = None
) -> Sequence:
    """A request that generates exactly `count` tokens."""
    sampler = SamplerState(params or SamplingParams(), SamplingDefaults(), prompt, frozenset())
    return Sequence(
        request_id=name,
        prompt_ids=prompt,
        max_new_tokens=count,
        eos_ids=frozenset(),
        sampler=sampler,
        detokenizer=Detokenizer(tokenizer()),
    )


class Run:
    """Remembers what a scheduler emitted, and the most KV it used."""

    def __init__(
        self, engine: PagedEngine, *, max_batch_size: int = 8, max_step_tokens: int = 16
    ) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.text: dict[str, str] = {}
        self.finished: list[str] = []
        self.failed: list[tuple[str, type[Exception]]] = []
        self.peak = 0
        self.engine = engine
        self.scheduler = Scheduler(
            engine,
            Limits(max_batch_size, max_step_tokens),
            emit=self._take,
            fail=self._failed,
            describe=lambda _: ("", b""),
        )

    def _failed(self, request_id: str, error: Exception) -> None:
        self.failed.append((request_id, type(error)))

    def _take(self, deltas: list[TextDelta]) -> None:
        for delta in deltas:
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            self.text[delta.request_id] = self.text.get(delta.request_id, "") + delta.text
            if delta.finish_reason:
                self.finished.append(delta.request_id)

    def step(self) -> None:
        """One step."""
        self.scheduler.step()
        self.peak = max(self.peak, self.scheduler.kv_used)

    def drain(self) -> None:
        """Until nothing is left to do."""
        while self.scheduler.busy:
            self.step()
