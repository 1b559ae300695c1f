"""Rendering and tokenising in processes: what they give, and what they may take."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from runners.contracts.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineFailure,
    InvalidRequest,
)
from runners.contracts.text import ChatMessage, ChatPrompt
from runners.protocol.messages import Detokenize, Text, Tokenize, Tokens
from runners.text.tokenization import MAX_REASON, PromptTokenizer
from runners.text.tokenizer_pool import PROCESSES, TokenizerPool
from runners.text.tokenizer_process import CallLimits, TokenizerProcess
from tests.support.models import write_tokenizer
from tests.support.processes import alive, wait_until

MIB = 1024**2
TIGHT = CallLimits(render_s=0.2, cpu_s=0.4, memory=64 * MIB, kept_memory=16 * MIB)
SMALL = CallLimits(render_s=60, cpu_s=60, memory=64 * MIB, kept_memory=16 * MIB)
PATIENT = CallLimits(render_s=1000, cpu_s=1000)
MAX_TOKENS = 512
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LOOP_IF_TOLD = "{% if messages[0]['content'] == 'loop' %}" + LOOP + "{% endif %}hello"
PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
WITH_ALL = (
    "{{ bos_token }}{{ strftime_now('%Y') }}{% for m in messages %}{{ m | tojson }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{% generation %}a{% endgeneration %}{{ tools is none }}{{ eos_token }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Start = Callable[..., TokenizerProcess]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def load(folder: Path, template: str | None, **changes: object) -> PromptTokenizer:
    """The folder's tokenizer with a chat template, and with changes in its tokenizer.json."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    if changes:
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | changes
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return PromptTokenizer(tokenizer, len(tokenizer), max_tokens=MAX_TOKENS)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    started = []

    def start(
        template: str | None, limits: CallLimits = TIGHT, **changes: object
    ) -> TokenizerProcess:
        started.append(TokenizerProcess(load(folder, template, **changes), limits))
        return started[-1]

    yield start
    for process in started:
        process.close()


def chat(*contents: str) -> ChatPrompt:
    return ChatPrompt(messages=[ChatMessage(role="user", content=text) for text in contents])


@pytest.mark.parametrize("template", [PLAIN, WITH_ALL])
def test_a_process_gives_what_transformers_does(start: Start, folder: Path, template: str) -> None:
    process, plain = start(template), load(folder, template).tokenizer
    messages = [{"role": "user", "content": text} for text in ("hello", "<b> ä 日本")]
    assert process.encode(chat("hello", "<b> ä 日本")) == plain.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    ids = plain("the cat sat").input_ids
    assert process.encode("the cat sat") == ids
    assert process.decode(ids) == plain.decode(ids)
    assert process.answer(Tokenize(7, "the cat", False)) == Tokens(
        7, plain("the cat", add_special_tokens=False).input_ids
    )
    assert process.answer(Detokenize(8, ids, False)) == Text(8, str(plain.decode(ids)))


@pytest.mark.parametrize(
    ("template", "limits", "problem"),
    [
        (LOOP, TIGHT, "the model's chat template exceeded 0.2 s of CPU time"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", SMALL, "template fails"),
        ("{{ 'x' * 10**9 }}", SMALL, "needs more than 64 MiB of memory"),
        ("{{ '%1000000000d' % 1 }}", SMALL, "needs more than 64 MiB of memory"),
        ("{{ range(99999) | map('string') | join('x' * 10**6) }}", SMALL, "needs more than 64 MiB"),
        (
            "{% set ns = namespace(s='xy') %}{% for i in range(99) %}"
            "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            SMALL,
            "needs more than 64 MiB of memory",
        ),
        ("{{ raise_exception('no') }}", SMALL, "refuses these messages: no"),
        ("{{ 1 / 0 }}", SMALL, "fails on these messages: ZeroDivisionError"),
        ("{{ missing.thing }}", SMALL, "refuses these messages"),
        (None, SMALL, "has no chat template"),
    ],
)
def test_a_template_fails_its_own_request_only(
    start: Start, template: str | None, limits: CallLimits, problem: str
) -> None:
    process = start(template, limits)
    hello = process.encode("hello")
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=problem) as caught:
            process.encode(chat("hello"))
        assert caught.value.field == "messages"
        assert process.encode("hello") == hello


def test_an_error_of_a_template_is_cut(start: Start) -> None:
    with pytest.raises(InvalidRequest) as caught:
        start("{{ raise_exception('x' * 100000) }}").encode(chat("hello"))
    assert len(caught.value.reason) < MAX_REASON + 100


def regex(pattern: str) -> dict[str, object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"pre_tokenizer": split | {"invert": False}}


def test_a_regex_of_the_tokenizer_fails_its_own_request_only(start: Start) -> None:
    process = start(None, **regex("(a+)+$"))
    hello = process.encode("hello")
    # Many matches that are slow, and one so slow that the tokenizer panics.
    with pytest.raises(InvalidRequest, match=r"the tokenizer exceeded 0.4 s of CPU time") as caught:
        process.encode(("a" * 18 + "b") * 100)
    assert caught.value.field == "prompt"
    assert process.encode("hello") == hello
    with pytest.raises(EngineFailure, match="PanicException"):
        process.encode("a" * 100 + "b")
    assert process.encode("hello") == hello


@pytest.mark.parametrize("prompt", ["a " * 10**6, chat("a " * 10**6)])
def test_what_cannot_fit_is_not_tokenised(start: Start, prompt: str | ChatPrompt) -> None:
    process = start(PLAIN)  # tokenising it takes more than 64 MiB
    with pytest.raises(ContextLengthExceeded, match="characters, more than the 512 tokens"):
        process.encode(prompt)


def test_a_process_that_has_grown_is_replaced(start: Start) -> None:
    process = start(PLAIN)
    process.encode("hello")
    before = pids(process)
    assert process.encode(chat("hello"))
    assert pids(process) == before != []
    process = start(PLAIN, CallLimits(kept_memory=0))
    ids = process.encode(chat("hello"))  # which compiles the template
    assert pids(process) == []
    assert process.encode(chat("hello")) == ids


def pids(process: TokenizerProcess) -> list[int]:
    running = process._process
    return [] if running is None or running.pid is None else [running.pid]


def test_a_process_that_somebody_killed_is_started_again(start: Start) -> None:
    process = start(PLAIN)
    hello = process.encode("hello")
    [pid] = pids(process)
    psutil.Process(pid).kill()
    with pytest.raises(EngineFailure, match="was ended: exit code -9"):
        process.encode("hello")
    assert process.encode("hello") == hello


def test_a_process_that_hangs_is_replaced(start: Start) -> None:
    process = start(PLAIN, CallLimits(wall_s=1.0))
    hello = process.encode("hello")
    [pid] = pids(process)
    psutil.Process(pid).suspend()
    with pytest.raises(EngineFailure, match="hangs"):
        process.encode("hello")
    assert process.encode("hello") == hello


def test_a_process_ends_with_its_rank(start: Start) -> None:
    process = start(LOOP, PATIENT)
    process.start()
    [pid] = pids(process)
    child = psutil.Process(pid)
    process._connection.send_bytes(msgspec.msgpack.encode(Tokenize(1, chat("hello"), True)))
    start_s = child.cpu_times().user
    wait_until(lambda: child.cpu_times().user > start_s + 0.3, 60, "the template loops")
    process._connection.close()
    wait_until(lambda: not alive([child]), 30, "the process is gone")


def test_a_call_that_nobody_waits_for_ends(start: Start) -> None:
    process = start(LOOP_IF_TOLD, PATIENT)
    hello = process.encode(chat("hello"))
    process.is_wanted = lambda: False
    with pytest.raises(EngineFailure, match="aborted"):
        process.encode(chat("loop"))
    process.is_wanted = lambda: True
    assert process.encode(chat("hello")) == hello


def test_a_tokenizer_that_cannot_be_copied_stops_the_start(folder: Path) -> None:
    tokenizer = load(folder, None)
    tokenizer.tokenizer.unpicklable = threading.Lock()
    with pytest.raises(ConfigError, match="cannot be copied into another process"):
        TokenizerPool(tokenizer)


@pytest.fixture
def pool(folder: Path) -> Iterator[TokenizerPool]:
    pool = TokenizerPool(load(folder, LOOP_IF_TOLD), PATIENT)
    yield pool
    for key in list(pool._jobs):
        pool.abort(key)
    pool._threads.shutdown()
    while not pool._idle.empty():
        pool._idle.get().close()


def test_aborted_jobs_make_room_and_are_never_begun(pool: TokenizerPool) -> None:
    delivered: SimpleQueue[str] = SimpleQueue()
    begun = []
    running = threading.Semaphore(0)

    def job(name: str, prompt: ChatPrompt) -> Callable[[TokenizerProcess], str]:
        def work(process: TokenizerProcess) -> str:
            begun.append(name)
            running.release()
            try:
                process.encode(prompt)
            except EngineFailure:
                return f"{name} was aborted"
            return name

        return work

    endless = [f"endless {i}" for i in range(PROCESSES)]
    for name in endless:
        pool.submit(name, job(name, chat("loop")), delivered.put)
        assert running.acquire(timeout=60)
    for i in range(10):
        pool.submit(i, job(f"left {i}", chat("loop")), delivered.put)
    pool.submit("last", job("last", chat("hello")), delivered.put)
    assert len(pool) == len(endless) + 11
    for i in range(10):
        pool.abort(i)
    assert len(pool) == len(endless) + 1
    pool.abort(endless[0])
    assert delivered.get(timeout=60) == "last"
    assert begun == [*endless, "last"]
    assert len(pool) == len(endless) - 1
    assert delivered.empty()


STEPS = st.recursive(
    st.sampled_from(
        [
            "{{ messages[0]['content'] }}",
            "{% set ns.s = ns.s ~ ns.s %}",
            "{% set ns.s = ns.s * 1000 %}",
            "{% set ns.l = ns.l + [ns.s, ns.l] %}",
            "{{ ns.s }}",
            "{{ ns.l | tojson }}",
            "{{ range(99999) | list | length }}",
            "{{ ns.s | replace('x', ns.s) | upper | length }}",
            "{{ ns.l | map('string') | join(ns.s) | length }}",
            "{{ '%*d' % (10 ** 8, 1) }}",
            "{{ 7 ** 7 ** 7 }}",
            "{{ ns.s.split('x') | length }}",
            "{% break %}",
            "{{ raise_exception(ns.s) }}",
        ]
    ),
    lambda inner: st.tuples(
        st.sampled_from(
            ["{% for i in range(99999) %}", "{% for x in ns.l %}", "{% for x in ns.s %}"]
        ),
        st.lists(inner, min_size=1, max_size=3).map("".join),
    ).map(lambda parts: f"{parts[0]}{parts[1]}{{% endfor %}}"),
    max_leaves=6,
)


@settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(STEPS, min_size=1, max_size=4))
def test_no_template_hangs_or_crashes_anything(start: Start, steps: list[str]) -> None:
    process = start("{% set ns = namespace(s='x', l=['x']) %}" + "".join(steps))
    with contextlib.suppress(InvalidRequest, ContextLengthExceeded):
        process.encode(chat("hello"))
    assert process.encode("hello")
    process.close()
