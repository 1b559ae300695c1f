"""The ragged engine on real models: which path each architecture gets, and that both are right."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerBase,
)

from runners.contracts import SamplingParams, TextDelta
from runners.errors import ConfigError
from runners.ragged.detokenizer import Detokenizer
from runners.ragged.engine import RaggedEngine
from runners.ragged.sampling import SamplerState, SamplingDefaults
from runners.ragged.scheduler import Generation, Limits, Scheduler
from tests.support.models import CONFIGS, greedy, write_model, write_tokenizer

COUNT = 12
PROMPTS = [[5, 6, 7], [9] * 30, [11], list(range(20, 70))]
PADDED = {"bloom", "gptj", "gpt_neo", "mpt", "falcon", "qwen2_moe"}


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer that all the models here have."""
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        return loaded


def load(folder: Path) -> RaggedEngine:
    return RaggedEngine(AutoModelForCausalLM.from_pretrained(folder))


def generation(name: str, prompt: list[int], count: int = COUNT) -> Generation:
    params = SamplingParams()
    return Generation(
        request_id=name,
        prompt_ids=prompt,
        max_new_tokens=count,
        eos_ids=frozenset(),
        sampler=SamplerState(params, SamplingDefaults(), prompt, frozenset()),
        detokenizer=Detokenizer(tokenizer()),
    )


class Run:
    """A scheduler over a real engine that remembers what it emitted."""

    def __init__(self, engine: RaggedEngine, **limits: int) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: list[str] = []
        self.failed: list[tuple[str, type[Exception]]] = []
        self.engine = engine
        bounds = {"max_batch_size": 8, "max_step_tokens": 16, "max_kv_tokens": 4096} | limits
        self.scheduler = Scheduler(
            engine,
            Limits(**bounds),
            emit=self._take,
            fail=self._failed,
            describe=lambda _: ("", b""),
        )

    def _failed(self, request_id: str, error: Exception) -> None:
        self.failed.append((request_id, type(error)))

    def _take(self, deltas: list[TextDelta]) -> None:
        for delta in deltas:
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason:
                self.finished.append(delta.request_id)

    def drain(self) -> None:
        while self.scheduler.busy:
            self.scheduler.step()


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_mixed_chunked_steps_equal_generate(kind: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    engine = load(folder)
    assert engine.path == ("padded" if kind in PADDED else "packed")
    run = Run(engine)
    for i, prompt in enumerate(PROMPTS):
        run.scheduler.add(generation(str(i), prompt))
        run.scheduler.step()  # the next one joins a step later
    run.drain()
    expected = greedy(folder, PROMPTS, COUNT)
    assert [run.tokens[str(i)] for i in range(len(PROMPTS))] == expected


def test_one_failing_sampler_ends_its_own_sequence_only(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    run = Run(load(folder))
    good, bad = generation("good", PROMPTS[0]), generation("bad", PROMPTS[1])
    bad.sampler.min_new_tokens = 5
    bad.sampler.eos_ids = [10**6]
    for each in (good, bad):
        run.scheduler.add(each)
    run.drain()
    assert run.failed == [("bad", IndexError)]
    assert run.tokens["good"] == greedy(folder, PROMPTS[:1], COUNT)[0]
    assert run.scheduler.kv_reserved == 0


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_half_precision_is_served_too(kind: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind, dtype=torch.bfloat16)
    assert load(folder).path == ("padded" if kind in PADDED else "packed")


def test_a_model_that_ignores_its_cache_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model("bloom", tmp_path / "bloom"))
    plain = model.forward

    def forgetful(**kwargs: object) -> object:
        kwargs.pop("past_key_values", None)
        kwargs.pop("attention_mask", None)
        return plain(**kwargs)

    model.forward = forgetful
    with pytest.raises(ConfigError, match="can not be batched continuously"):
        RaggedEngine(model)


def test_a_state_space_model_is_refused_with_a_sentence() -> None:
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ConfigError, match="MambaForCausalLM can not be batched continuously"):
        RaggedEngine(MambaForCausalLM(config))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


def test_kv_budget_admits_in_order_and_is_never_exceeded(llama: Path) -> None:
    run = Run(load(llama), max_kv_tokens=70)
    for i, prompt in enumerate(PROMPTS):
        run.scheduler.add(generation(str(i), prompt))
    peak = 0
    while run.scheduler.busy:
        run.scheduler.step()
        peak = max(peak, run.scheduler.kv_reserved)
    assert 0 < peak <= 70
    assert run.scheduler.kv_reserved == 0
    assert run.finished[-1] == "3"  # 61 tokens: waits until the others left
    assert run.tokens == {str(i): ids for i, ids in enumerate(greedy(llama, PROMPTS, COUNT))}


def test_a_long_prompt_does_not_stall_running_sequences(llama: Path) -> None:
    run = Run(load(llama), max_step_tokens=8)
    run.scheduler.add(generation("short", [5, 6, 7], 40))
    run.scheduler.step()
    run.scheduler.add(generation("long", [8] * 100, 4))
    for steps in range(1, 12):
        run.scheduler.step()
        assert len(run.tokens["short"]) == 1 + steps
    assert "long" not in run.tokens


def test_abort_frees_kv_within_the_step_also_while_waiting(llama: Path) -> None:
    run = Run(load(llama), max_batch_size=1)
    run.scheduler.add(generation("first", [5, 6, 7], 40))
    run.scheduler.add(generation("second", [5, 6, 7], 4))
    run.scheduler.step()
    assert (run.scheduler.running, run.scheduler.waiting) == (1, 1)
    run.scheduler.abort("first")
    assert run.scheduler.kv_reserved == 0
    run.scheduler.abort("nobody")
    run.scheduler.step()
    assert (run.scheduler.running, run.scheduler.waiting) == (1, 0)
    run.scheduler.abort("second")
    assert not run.scheduler.busy
    assert "second" not in run.finished
