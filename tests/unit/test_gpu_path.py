"""The path of a GPU on a CPU: overlapping steps, memory that is not enough.

That its tokens are those of `generate` is in test_engine and test_scheduler, which run on it too.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM

from runners.contracts.errors import ConfigError, EngineFailure
from runners.contracts.text import SamplingParams
from runners.text.detokenizer import Detokenizer
from runners.text.engine import PagedEngine, PendingStep, Row
from tests.support.models import greedy
from tests.support.scheduling import COUNT, Run, gpu_runner, load, pages, sequence, tokenizer

PROMPTS = [[5, 6, 7], [9] * 30, [11], list(range(20, 70))]
BLOCK = 32


class Order:
    """In which order steps are submitted and their results fetched."""

    def __init__(self, engine: PagedEngine) -> None:
        self.events: list[str] = []
        self.rows: list[list[Row]] = []
        submit = engine.submit

        def recorded(rows: Any) -> PendingStep:
            number = len(self.rows)
            self.rows.append(list(rows))
            self.events.append(f"submit {number}")
            step = submit(rows)
            result = step.result

            class Step:
                def result(step) -> Any:  # noqa: N805
                    self.events.append(f"result {number}")
                    return result()

            return Step()

        engine.submit = recorded  # type: ignore[method-assign]


def test_a_step_is_submitted_before_the_tokens_of_the_last_are_known(llama: Path) -> None:
    engine = pages(llama)
    order = Order(engine)
    run = Run(engine)
    run.scheduler.add(sequence("only", [5, 6, 7], 4))
    run.drain()
    assert order.events[:5] == ["submit 0", "submit 1", "result 0", "submit 2", "result 1"]
    # Its length is known beforehand: no step is submitted in vain.
    assert len(order.rows) == 4
    assert run.tokens == {"only": greedy(llama, [[5, 6, 7]], 4)[0]}


def test_without_overlap_each_step_is_fetched_before_the_next(llama: Path) -> None:
    engine = pages(llama, overlap=False)
    order = Order(engine)
    run = Run(engine)
    run.scheduler.add(sequence("only", [5, 6, 7], 4))
    run.drain()
    assert order.events[:4] == ["submit 0", "result 0", "submit 1", "result 1"]
    assert run.tokens == {"only": greedy(llama, [[5, 6, 7]], 4)[0]}


def test_an_end_token_costs_one_discarded_token(llama: Path) -> None:
    engine = pages(llama)
    order = Order(engine)
    run = Run(engine)
    want = greedy(llama, [PROMPTS[1]], 40)[0]
    end = want[5]
    ending = sequence("ending", PROMPTS[1], 40)
    ending.eos_ids = frozenset({end})
    run.scheduler.add(ending)
    run.scheduler.add(sequence("other", PROMPTS[0], 40))
    run.drain()
    assert run.tokens["ending"] == want[: want.index(end) + 1]
    assert run.tokens["other"] == greedy(llama, [PROMPTS[0]], 40)[0]
    steps = [row.index for rows in order.rows for row in rows if row.uid == 0 and row.sampler]
    assert steps == list(range(want.index(end) + 2))
    assert run.scheduler.kv_used == 0


def test_a_stop_string_cuts_the_text_where_it_begins(llama: Path) -> None:
    whole = str(tokenizer().decode(greedy(llama, [PROMPTS[0]], 24)[0], skip_special_tokens=True))
    run = Run(pages(llama))
    stopping = sequence("stopping", PROMPTS[0], 24)
    stopping.detokenizer = Detokenizer(tokenizer(), [whole[4:6]])
    run.scheduler.add(stopping)
    run.drain()
    assert run.text["stopping"] == whole[: whole.index(whole[4:6])]
    assert run.scheduler.kv_used == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_nothing_is_emitted_after_an_abort(steps: int, llama: Path) -> None:
    run = Run(pages(llama, prefix_caching=False))
    for name in ("gone", "stays"):
        run.scheduler.add(sequence(name, PROMPTS[0], 20))
    for _ in range(steps):
        run.step()
    before = list(run.tokens.get("gone", []))
    run.scheduler.abort("gone")
    # It takes the blocks that the aborted one writes to in the step that is under way.
    run.scheduler.add(sequence("next", PROMPTS[1], 20))
    run.drain()
    assert run.tokens.get("gone", []) == before
    assert "gone" not in run.finished
    assert run.tokens["stays"] == greedy(llama, [PROMPTS[0]], 20)[0]
    assert run.tokens["next"] == greedy(llama, [PROMPTS[1]], 20)[0]
    assert run.scheduler.kv_used == 0


def test_the_last_abort_leaves_a_step_that_is_fetched(llama: Path) -> None:
    run = Run(pages(llama))
    run.scheduler.add(sequence("gone", PROMPTS[0], 20))
    run.step()
    run.scheduler.abort("gone")
    assert run.scheduler.kv_used == 0
    run.drain()
    assert run.tokens == {}


def test_answers_alone_and_in_any_batch_are_the_same(llama: Path) -> None:
    params = {
        str(i): SamplingParams(temperature=0.8, seed=i, top_p=0.9, repetition_penalty=1.2)
        for i in range(6)
    }

    def tokens(names: list[str], **options: Any) -> dict[str, list[int]]:
        run = Run(pages(llama, **options))
        for name in names:
            run.scheduler.add(sequence(name, PROMPTS[int(name) % 4], 40, params[name]))
        run.drain()
        return run.tokens

    alone = {name: tokens([name])[name] for name in params}
    assert tokens(list(params)) == alone
    assert tokens(list(params), kv_tokens=6 * BLOCK) == alone, "preempted"
    assert tokens(list(params), cuda_graphs=False, overlap=False) == alone


def test_a_step_without_memory_fails_one_request_and_shrinks_the_cache(llama: Path) -> None:
    engine = pages(llama)
    total = engine.total_tokens
    run = Run(engine, max_step_tokens=64)
    for i in (0, 2):
        run.scheduler.add(sequence(str(i), PROMPTS[i], 30))
    for _ in range(4):
        run.step()
    compute = engine.model.run
    failures = iter([True])

    def without_memory(batch: Any) -> torch.Tensor:
        if sum(map(len, batch.tokens)) > 8 and next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(batch)

    engine.model.run = without_memory  # type: ignore[method-assign]
    run.scheduler.add(sequence("large", PROMPTS[3], 30))
    run.drain()
    assert run.failed == [("large", EngineFailure)]
    assert engine.total_tokens == total * 9 // 10 // BLOCK * BLOCK
    want = greedy(llama, [PROMPTS[0], PROMPTS[2]], 30)
    assert run.tokens == {"0": want[0], "2": want[1]}
    assert gpu_runner(engine).graphs is not None


def without_memory_once(engine: PagedEngine) -> None:
    """The next step finds no memory."""
    compute = engine.model.run
    failures = iter([True])

    def run(batch: Any) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(batch)

    engine.model.run = run  # type: ignore[method-assign]


def test_a_request_that_no_longer_fits_is_refused_and_blocks_nobody(llama: Path) -> None:
    engine = pages(llama, kv_tokens=4 * BLOCK)
    run = Run(engine, max_step_tokens=64)
    without_memory_once(engine)
    run.scheduler.add(sequence("first", PROMPTS[3], 4))
    run.scheduler.add(sequence("needs four blocks", PROMPTS[1], 80))
    run.scheduler.add(sequence("small", PROMPTS[0], 20))
    run.drain()
    assert run.failed == [("first", EngineFailure), ("needs four blocks", EngineFailure)]
    assert run.tokens == {"small": greedy(llama, [PROMPTS[0]], 20)[0]}


def test_a_sequence_that_ends_in_the_step_before_is_not_failed(llama: Path) -> None:
    engine = pages(llama)
    run = Run(engine)
    ending = sequence("ending", PROMPTS[0], 20)
    ending.eos_ids = frozenset({greedy(llama, [PROMPTS[0]], 1)[0][0]})
    run.scheduler.add(ending)
    run.step()
    without_memory_once(engine)
    run.drain()
    assert run.finished == ["ending"]
    assert run.failed == []


def test_an_idle_capture_without_memory_ends_only_the_captures(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = pages(llama)
    runner = gpu_runner(engine)

    def without_memory(_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_compute", without_memory)
        engine.idle()
    assert "no further steps are captured as graphs: CUDA out of memory." in caplog.text
    run = Run(engine)
    run.scheduler.add(sequence("only", PROMPTS[0]))
    run.drain()
    assert run.tokens["only"] == greedy(llama, PROMPTS[:1], COUNT)[0]


def test_logits_may_be_narrower_than_the_embedding(llama: Path) -> None:
    engine = pages(llama)
    run = Run(engine)
    compute = engine.model.run
    engine.model.run = lambda batch: compute(batch)[:, :300]  # type: ignore[method-assign]
    run.scheduler.add(sequence("only", PROMPTS[0]))
    run.drain()
    assert len(run.tokens["only"]) == COUNT


def test_what_cannot_shrink_ends_the_rank(llama: Path) -> None:
    run = Run(load(llama))
    run.engine.model.shrink = lambda: None  # type: ignore[method-assign]

    def without_memory(_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run.engine.model.run = without_memory  # type: ignore[method-assign,assignment]
    run.scheduler.add(sequence("only", PROMPTS[0]))
    with pytest.raises(torch.OutOfMemoryError):
        run.drain()


def test_a_kernel_of_a_gpu_is_refused_on_a_cpu(llama: Path) -> None:
    with pytest.raises(ConfigError, match="varlen is for models on a GPU"):
        load(llama, attention_kernel="varlen")


def test_quantized_weights_of_the_cpu_are_refused_there(llama: Path) -> None:
    with pytest.raises(ConfigError, match="is for models on a CPU") as caught:
        load(llama, attention_kernel="torch", quantization="int8")
    assert caught.value.field == "weight_quantization"


def test_an_offloaded_model_runs_without_graphs_and_says_so(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    original = AutoModelForCausalLM.from_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            AutoModelForCausalLM,
            "from_pretrained",
            lambda folder: cpu_offload(original(folder), torch.device("cpu")),
        )
        engine = pages(llama)
    assert "decode steps run eagerly: parts of the model are moved" in caplog.text
    run = Run(engine)
    run.scheduler.add(sequence("only", PROMPTS[1]))
    run.drain()
    assert run.tokens["only"] == greedy(llama, [PROMPTS[1]], COUNT)[0]


def test_a_model_runs_on_the_kernel_itself(llama: Path) -> None:
    """In Triton's interpreter, which conftest switches on."""
    run = Run(load(llama, attention_kernel="triton", max_step_tokens=48, max_batch_size=2))
    for i, prompt in enumerate([[5, 6, 7], [9] * 34]):
        run.scheduler.add(sequence(str(i), prompt, 3))
    run.drain()
    want = greedy(llama, [[5, 6, 7], [9] * 34], 3)
    assert run.tokens == {"0": want[0], "1": want[1]}
