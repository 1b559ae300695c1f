"""MII's published code, unchanged except for the added import of the patches.

The model is a tiny one in a folder with the name of the published model.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import transformers as tf

from tests.mii.conftest import PATCHES, Scripts
from tests.support.models import greedy, write_model
from tests.support.processes import mii_processes, wait_until
from tests.support.server import HTTP

NAME = "mistralai/Mistral-7B-v0.1"
SHOW = """
print("SHOWN", json.dumps([
    [r.generated_text, r.prompt_length, r.generated_length, str(r.finish_reason)] for r in {}
]))
"""


def show(name: str) -> str:
    return "import json" + SHOW.format(name)


def shown(printed: str) -> list[list[object]]:
    return json.loads(re.findall(r"SHOWN (.*)", printed)[-1])  # type: ignore[no-any-return]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model("mistral", tmp_path / NAME)


def expected(model: Path, prompts: list[str], count: int) -> list[str]:
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in greedy(model, prompts, count)
    ]


PROMPTS = ["DeepSpeed is", "Seattle is"]
GREEDY = "do_sample=False, ignore_eos=True, max_new_tokens=12"


def test_pipeline(scripts: Scripts, model: Path) -> None:
    printed = scripts.run(
        PATCHES
        + f"""
import mii
pipe = mii.pipeline("{NAME}")
response = pipe(["DeepSpeed is", "Seattle is"], max_new_tokens=128)
print(response)
response = pipe({PROMPTS}, {GREEDY})
"""
        + show("response")
    )
    assert [row[0] for row in shown(printed)] == expected(model, PROMPTS, 12)
    assert [row[2:] for row in shown(printed)] == [[12, "GenerationFinishReason.LENGTH"]] * 2


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ("", 1),
        (", tensor_parallel=2", 2),
        (", replica_num=2", 2),
        (", replica_num=2, tensor_parallel=2", 4),
    ],
)
def test_serve_then_clients_then_terminate(
    arguments: str, ranks: int, scripts: Scripts, model: Path
) -> None:
    """The clients are stock MII's, in processes without the patches."""
    printed = scripts.run(
        PATCHES
        + f"""
import mii
client = mii.serve("{NAME}"{arguments})
response = client(["DeepSpeed is", "Seattle is"], max_new_tokens=128)
print(response)
response = client({PROMPTS}, {GREEDY})
"""
        + show("response"),
        timeout=240,
    )
    want = expected(model, PROMPTS, 12)
    assert [row[0] for row in shown(printed)] == want
    family = mii_processes(scripts.folder)
    assert sum("replica" in " ".join(p.cmdline()) for p in family) == ranks
    printed = scripts.run(
        f"""
import mii
client = mii.client("{NAME}")
response = client(["DeepSpeed is", "Seattle is"], max_new_tokens=128)
print(response)
response = client({PROMPTS}, {GREEDY})
streamed = []
client("Seattle is", streaming_fn=lambda r: streamed.append(r[0].generated_text), {GREEDY})
print("STREAMED", len(streamed), "".join(streamed) == response[1].generated_text)
"""
        + show("response")
        + "client.terminate_server()"
    )
    assert [row[0] for row in shown(printed)] == want
    assert "STREAMED 12 True" in printed
    wait_until(lambda: not mii_processes(scripts.folder), 10, "all of the deployment is gone")


def test_the_rest_gateway_answers_and_goes_with_the_deployment(
    scripts: Scripts, model: Path
) -> None:
    printed = scripts.run(
        PATCHES
        + f"""
import mii
client = mii.serve("{NAME}", deployment_name="mistral-deployment", enable_restful_api=True)
print("PORT", client.mii_config.restful_api_port)
"""
    )
    port = re.findall(r"PORT (\d+)", printed)[0]
    url = f"http://localhost:{port}/mii/mistral-deployment"
    wait_until(lambda: _answers(port), 20, "the gateway is up")
    body = {"prompts": PROMPTS, "do_sample": False, "ignore_eos": True, "max_new_tokens": 12}
    answer = HTTP.post(url, json=body, timeout=60)
    assert [row["generated_text"] for row in answer.json()] == expected(model, PROMPTS, 12)
    stopped = HTTP.post(url, json=body | {"stop": [answer.json()[0]["generated_text"][2:5], "q"]})
    assert stopped.json()[0]["finish_reason"] == "stop"
    assert HTTP.post(url, json={"prompts": "x", "nope": 1}).status_code == 400
    assert HTTP.post(url, json=[]).status_code == 400
    scripts.run('import mii\nmii.client("mistral-deployment").terminate_server()')
    wait_until(lambda: not mii_processes(scripts.folder), 10, "the gateway is gone too")


def _answers(port: str) -> bool:
    try:
        return HTTP.get(f"http://localhost:{port}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_tensor_parallel_by_the_deepspeed_launcher(scripts: Scripts, model: Path) -> None:
    """`deepspeed --num_gpus 2 mii-example.py`, as the README has it."""
    example = scripts.folder / "mii-example.py"
    example.write_text(
        PATCHES
        + f"""
import mii
pipe = mii.pipeline("{NAME}")
response = pipe({PROMPTS}, {GREEDY})
if pipe.is_rank_0:
"""
        + "    "
        + show("response").replace("\n", "\n    ")
    )
    out = scripts.folder / "launched.txt"
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    with out.open("w") as file:
        subprocess.run(
            [launcher, "--num_gpus", "2", "mii-example.py"],
            cwd=scripts.folder,
            env=scripts.env
            | {"LOCAL_SIZE": "2", "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=200,
            check=False,
        )
    assert [row[0] for row in shown(out.read_text())] == expected(model, PROMPTS, 12), (
        out.read_text()[-3000:]
    )


def test_a_model_that_cannot_be_served_ends_the_deployment_with_a_reason(scripts: Scripts) -> None:
    (scripts.folder / "empty").mkdir()
    (scripts.folder / "empty" / "config.json").write_text('{"model_type": "llama"}')
    began = time.monotonic()
    printed = scripts.run(PATCHES + 'import mii\nmii.serve("empty")', fails=True)
    assert "ConfigError" in printed
    assert "cannot be loaded" in printed
    assert time.monotonic() - began < 100
    wait_until(lambda: not mii_processes(scripts.folder), 10, "all of the deployment is gone")
