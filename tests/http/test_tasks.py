"""The tasks of MII's legacy releases over HTTP, held against `transformers.pipeline` itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from runners.contracts.tasks import PipelineTask
from tests.support.processes import ranks_below, wait_until
from tests.support.server import HTTP, Server
from tests.support.task_models import HEADS, POSITIONS, pipeline_of, write_task_model

TEXTS = [
    "the cat sat on the mat",
    "anna lives in paris and she sings very good",
    "it is warm",
    "Where does the dog look? In PARIS, with Anna.",
]
MASKED = ["the [MASK] sat on a mat", "anna [MASK] in paris and [MASK] sings", "[MASK]"]
ABOUT = 1e-5
"""How far a score in a padded batch may be from the same alone."""


@pytest.fixture(scope="module")
def serve(
    tmp_path_factory: pytest.TempPathFactory, bentoml_home: Path
) -> Iterator[Callable[[PipelineTask], tuple[Server, Path]]]:
    """A server of a task, the same for all tests of it, and its model."""
    running: dict[str, tuple[Server, Path]] = {}
    with ExitStack() as stack:

        def made(task: PipelineTask) -> tuple[Server, Path]:
            if task not in running:
                folder = write_task_model(task, tmp_path_factory.mktemp("task") / "tiny")
                # A file of the forerunner's MII handler, as it was published.
                setup = {"model_name": "bert", "task": task}
                (folder / "setup_config.json").write_text(json.dumps(setup))
                server = Server(bentoml_home, {"TRIPTYCH_TEXT_MODEL": str(folder)})
                running[task] = stack.enter_context(server), folder
            return running[task]

        yield made


def outputs(server: Server, task: str, **body: Any) -> Any:
    answer = server.post(f"/tasks/{task}", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"]


def alike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same findings, up to the rounding of their scores."""
    assert [{**each, "score": 0} for each in ours] == [{**each, "score": 0} for each in theirs]
    assert [each["score"] for each in ours] == pytest.approx(
        [float(each["score"]) for each in theirs], abs=ABOUT
    )


def masks(found: Any) -> list[dict[str, Any]]:
    """What the fill-mask pipeline gives, as our API has it."""
    places = [found] if isinstance(found[0], dict) else found
    return [{"mask": i, **each} for i, place in enumerate(places) for each in place]


def entities(found: Any) -> list[dict[str, Any]]:
    """The same for token-classification."""
    return [
        {
            "label": each.get("entity_group", each.get("entity")),
            "score": each["score"],
            "word": each["word"],
            "start": each["start"],
            "end": each["end"],
            "index": each.get("index"),
        }
        for each in found
    ]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"targets": ["cat", "dog"]}])
def test_fill_mask(serve: Any, options: dict[str, Any]) -> None:
    server, folder = serve("fill-mask")
    pipe = pipeline_of("fill-mask", folder)
    found = outputs(server, "fill-mask", inputs=MASKED, **options)
    for text, ours in zip(MASKED, found, strict=True):
        alike(ours, masks(pipe(text, **options)))
    [single] = outputs(server, "fill-mask", inputs=MASKED[0], **options)
    alike(single, found[0])


@pytest.mark.parametrize("strategy", [None, "simple", "first", "average", "max"])
def test_token_classification(serve: Any, strategy: str | None) -> None:
    server, folder = serve("token-classification")
    options = {} if strategy is None else {"aggregation_strategy": strategy}
    pipe = pipeline_of("token-classification", folder)
    found = outputs(server, "token-classification", inputs=TEXTS, **options)
    assert any(found)
    for text, ours in zip(TEXTS, found, strict=True):
        alike(ours, entities(pipe(text, **options)))
    everything = outputs(server, "token-classification", inputs=TEXTS[0], ignore_labels=[])
    assert len(everything[0]) == 6


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 5}, {"function_to_apply": "sigmoid"}])
def test_text_classification(serve: Any, options: dict[str, Any]) -> None:
    server, folder = serve("text-classification")
    pipe = pipeline_of("text-classification", folder)
    found = outputs(server, "text-classification", inputs=TEXTS, **options)
    for text, ours in zip(TEXTS, found, strict=True):
        alike(ours, pipe(text, **({"top_k": 1} | options)))


def test_torchserves_clients_may_ask_too(serve: Any) -> None:
    for task, text in (("fill-mask", MASKED[0]), ("text-classification", TEXTS[0])):
        server, folder = serve(task)
        [found] = outputs(server, task, inputs=text, top_k=2)
        body = {"data": text, "top_k": 2}
        alike(server.post(f"/predictions/{folder.name}", body).json(), found)
    server, folder = serve("question-answering")
    asked = {"question": "where does anna live", "context": TEXTS[1]}
    found = outputs(server, "question-answering", **asked)
    alike(server.post(f"/predictions/{folder.name}", {"inputs": asked}).json(), found)
    text = json.dumps(asked)
    url = f"{server.url}/predictions/{folder.name}"
    for sent in (
        {"content": text},
        {"json": asked},
        {"json": {"data": asked}},
        {"json": {"data": text}},
        {"files": {"data": ("sample_text.txt", text)}},
        {"data": {"body": text}},
    ):
        alike(HTTP.post(url, **sent).json(), found)
    for bad, said in (
        ({"data": TEXTS[1]}, "the input must be a JSON object"),
        ({"data": [asked]}, "the input must be a JSON object"),
        ({"data": {"context": "a"}}, "question: Field required"),
        ({"question": "a"}, "context: Field required"),
    ):
        answer = HTTP.post(url, json=bad)
        assert (answer.status_code, answer.json()["code"]) == (400, 400)
        assert answer.json()["message"].startswith(said)


def test_the_labels_are_those_of_the_archive(bentoml_home: Path, tmp_path: Path) -> None:
    """TorchServe's `index_to_name.json`."""
    folder = write_task_model("text-classification", tmp_path / "tiny")
    names = {str(i): f"name {i}" for i in range(5)}
    (folder / "index_to_name.json").write_text(json.dumps(names))
    with Server(bentoml_home, {"TRIPTYCH_TEXT_MODEL": str(folder)}) as server:
        [found] = outputs(server, "text-classification", inputs=TEXTS[0], top_k=5)
    assert {each["label"] for each in found} == set(names.values())


def probabilities(
    folder: Path, question: str, context: str
) -> tuple[Any, dict[int, float], dict[int, float]]:
    """The tokens of one window, and which of the context's (0 is CLS) is a start or an end."""
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder)
    model: Any = HEADS["question-answering"].from_pretrained(folder)
    inputs = tokenizer(question, context, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    counted = [0, *(i for i, place in enumerate(inputs.sequence_ids(0)) if place == 1)]
    start, end = (x[0, counted].softmax(0).tolist() for x in (out.start_logits, out.end_logits))
    return (
        inputs,
        dict(zip(counted, start, strict=True)),
        dict(zip(counted, end, strict=True)),
    )


def spans(folder: Path, question: str, context: str, longest: int = 15) -> list[dict[str, Any]]:
    """All answers in a context of one window, by the definition, span after span."""
    inputs, start, end = probabilities(folder, question, context)
    inside = [i for i in start if i]
    whole = {i: inputs.word_to_chars(0, inputs.word_ids(0)[i], 1) for i in inside}
    found: dict[tuple[int, int], float] = {}
    for i in inside:
        for j in [j for j in inside if i <= j < i + longest]:
            span = whole[i].start, whole[j].end
            found[span] = max(found.get(span, 0.0), start[i] * end[j])
    best = sorted(found.items(), key=lambda each: -each[1])
    return [{"answer": context[a:b], "score": s, "start": a, "end": b} for (a, b), s in best]


def test_question_answering(serve: Any) -> None:
    server, folder = serve("question-answering")
    for context in TEXTS:
        for longest in (15, 2):
            asked = {"question": "who sings", "context": context, "max_answer_len": longest}
            [ours] = outputs(server, "question-answering", **asked)
            alike([ours], spans(folder, "who sings", context, longest)[:1])
    several = outputs(server, "question-answering", question="who", context=TEXTS[1], top_k=3)
    alike(several, spans(folder, "who", TEXTS[1])[: len(several)])


def test_a_long_context_is_read_in_windows(serve: Any) -> None:
    """The answer lies where it lies in a context that one window holds."""
    server, folder = serve("question-answering")
    context = " ".join(TEXTS * 12)
    found = outputs(server, "question-answering", question="who sings", context=context, top_k=3)
    assert found
    for each in found:
        assert context[each["start"] : each["end"]] == each["answer"] != ""
        assert 0 < each["score"] <= 1
    scores = [each["score"] for each in found]
    assert scores == sorted(scores, reverse=True)
    best = max(spans(folder, "who sings", text)[0]["score"] for text in TEXTS)
    assert scores[0] < best, "more context, more spans to choose among"


def test_no_answer_may_be_the_best(serve: Any) -> None:
    server, folder = serve("question-answering")
    asked = {"question": "who", "context": TEXTS[2], "top_k": 1000}
    found = outputs(server, "question-answering", **asked, handle_impossible_answer=True)
    [none] = [each for each in found if each["answer"] == ""]
    possible = outputs(server, "question-answering", **asked)
    assert possible == [each for each in found if each is not none]
    start, end = (scores[0] for scores in probabilities(folder, "who", TEXTS[2])[1:])
    assert none["score"] == pytest.approx(start * end, abs=ABOUT)


def test_many_at_once_get_what_each_gets_alone(serve: Any) -> None:
    server, _ = serve("text-classification")
    texts = [" ".join(TEXTS[i % 4].split()[: 1 + i % 5]) for i in range(24)]

    def ask(i: int) -> Any:
        return outputs(server, "text-classification", inputs=texts[i], top_k=1 + i % 3)[0]

    alone = [ask(i) for i in range(len(texts))]
    with ThreadPoolExecutor(12) as pool:
        for ours, own in zip(pool.map(ask, range(len(texts))), alone, strict=True):
            alike(ours, own)


@pytest.mark.parametrize(
    ("task", "body", "status", "said"),
    [
        ("fill-mask", {}, 400, "inputs"),
        ("fill-mask", {"inputs": []}, 400, "inputs"),
        ("fill-mask", {"inputs": "x", "temperature": 1}, 400, "temperature: is not a known field"),
        ("fill-mask", {"inputs": "the cat"}, 400, "no [MASK] to fill"),
        ("fill-mask", {"inputs": [MASKED[0], "the cat"]}, 400, "no [MASK] to fill"),
        ("fill-mask", {"inputs": "[MASK]", "targets": ["zebra"]}, 400, "target 0"),
        ("fill-mask", {"inputs": "[MASK]", "top_k": 0}, 400, "top_k"),
        ("fill-mask", {"inputs": "[MASK] a" * POSITIONS}, 400, f"at most {POSITIONS}"),
        ("fill-mask", {"inputs": "[MASK]", "model": "other"}, 404, "tiny"),
        ("text-classification", {"inputs": "x"}, 404, "only one for fill-mask"),
        ("conversational", {"text": "hello"}, 404, "needs a text-generation model"),
        ("summarization", {"inputs": "x"}, 404, "no POST /tasks/summarization"),
    ],
)
def test_bad_requests(serve: Any, task: str, body: dict[str, Any], status: int, said: str) -> None:
    server, _ = serve("fill-mask")
    answer = server.post(f"/tasks/{task}", body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]


def test_a_bad_input_hurts_nobody_beside_it(serve: Any) -> None:
    server, _ = serve("fill-mask")
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"inputs": MASKED[0]}, {"inputs": "no mask"}] * 8
        answers = list(pool.map(lambda body: server.post("/tasks/fill-mask", body), bodies))
    assert [answer.status_code for answer in answers] == [200, 400] * 8


def test_text_routes_say_what_there_is(serve: Any) -> None:
    server, _ = serve("fill-mask")
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    for path, body in [
        ("/generate", {"prompt": "x"}),
        ("/generate_stream", {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/v1/completions", {"model": "tiny", "prompt": "x"}),
        ("/v1/chat/completions", chat),
    ]:
        answer = server.post(path, body)
        assert answer.status_code == 404, path
        assert "POST /tasks/fill-mask" in answer.json()["error"]["message"]
    [card] = server.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", POSITIONS)
    assert 'triptych_requests_total{route="/tasks/fill-mask",status="200"}' in server.metrics()


def test_a_rank_that_is_killed_comes_back(serve: Any) -> None:
    server, folder = serve("question-answering")
    ranks = ranks_below(server.pid)
    for rank in ranks:
        rank.suspend()  # so that the requests are there when it dies
    with ThreadPoolExecutor(4) as pool:
        body = {"question": "who sings", "context": TEXTS[1]}
        asked = [pool.submit(server.post, "/tasks/question-answering", body) for _ in range(4)]
        wait_until(lambda: server.gauge("admitted_sequences") == 4, 20, "all are in the house")
        for rank in ranks:
            rank.kill()
        answers = [each.result() for each in asked]
    assert {answer.status_code for answer in answers} == {503}
    assert "went down with the request in flight" in answers[0].json()["error"]["message"]
    server.wait_ready()
    assert server.gauge("restarts") == 1
    [ours] = outputs(server, "question-answering", question="who sings", context=TEXTS[1])
    alike([ours], spans(folder, "who sings", TEXTS[1])[:1])


def test_conversational_goes_on(server: Server) -> None:
    """A text model with a chat template answers as its chat route does."""
    options = {"max_new_tokens": 8, "temperature": 0}
    first = server.post("/tasks/conversational", {"text": "hello", **options})
    assert first.status_code == 200, first.text
    said = first.json()
    assert said["past_user_inputs"] == ["hello"]
    assert said["generated_responses"] == [said["generated_text"]]
    second = server.post(
        "/tasks/conversational",
        {
            "text": "and the cat",
            "past_user_inputs": said["past_user_inputs"],
            "generated_responses": said["generated_responses"],
            **options,
        },
    )
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": said["generated_text"]},
        {"role": "user", "content": "and the cat"},
    ]
    body = {"model": said["model"], "messages": messages, "max_tokens": 8, "temperature": 0}
    chat = server.post("/v1/chat/completions", body).json()
    assert second.json()["generated_text"] == chat["choices"][0]["message"]["content"]
    uneven = server.post("/tasks/conversational", {"text": "x", "past_user_inputs": ["y"]})
    assert uneven.status_code == 400
    missing = server.post("/tasks/fill-mask", {"inputs": "[MASK]"})
    assert missing.status_code == 404
    assert "only one for text-generation" in missing.json()["error"]["message"]
