"""BentoCloud: the real `bentoml push` and `bentoml deploy` against a fake that is as strict."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import Home
from tests.support.bentocloud import BentoCloud, Transport
from tests.support.server import ROOT, bentoml_command, environment

Start = Callable[[Transport], BentoCloud]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts an empty fake of BentoCloud."""
    running: list[BentoCloud] = []

    def started(transport: Transport) -> BentoCloud:
        running.append(BentoCloud(tmp_path, transport).__enter__())
        return running[-1]

    yield started
    for cloud in running:
        cloud.__exit__(None, None, None)


def key(kind: str, tag: str) -> tuple[str, str, str]:
    name, _, version = tag.partition(":")
    return kind, name, version


def output(home: Home, cloud: BentoCloud, *arguments: str) -> str:
    """The output of a `bentoml` command that succeeds."""
    done = home.run(*arguments, **cloud.variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("transport", ["proxy", "presigned", "multipart"])
def test_a_push_uploads_the_bento_and_its_models(
    home: Home, start: Start, transport: Transport
) -> None:
    cloud = start(transport)
    output(home, cloud, "push", home.bento)
    wanted = {key("bento", home.bento), key("model", home.split), key("model", home.image)}
    assert cloud.items.keys() == wanted
    assert {(item.status, item.uploads) for item in cloud.items.values()} == {("success", 1)}
    assert len(cloud.calls_to("PUT", "/upload")) == (3 if transport == "proxy" else 0)
    assert len(cloud.calls_to("PUT", "blob")) == (0 if transport == "proxy" else 3)
    bento, model = cloud.items[key("bento", home.bento)], cloud.items[key("model", home.split)]
    assert {"src/service.py", "env/docker/Dockerfile"} <= set(bento.names)
    assert {"setup_config.json", "model/model.safetensors"} <= set(model.names)
    [service] = bento.wanted["manifest"]["services"]
    assert service["config"]["resources"] == {"gpu": 3}
    assert service["config"]["traffic"]["concurrency"] == 12


def test_a_large_model_is_uploaded_in_parts(home: Home, start: Start) -> None:
    cloud = start("multipart")
    output(home, cloud, "models", "push", home.large)
    assert cloud.items[key("model", home.large)].status == "success"
    assert len(cloud.calls_to("PUT", "blob")) == 2


def test_what_has_been_uploaded_is_not_sent_again(home: Home, start: Start) -> None:
    cloud = start("proxy")
    output(home, cloud, "models", "push", home.split)
    output(home, cloud, "push", home.bento)
    assert "already exists" in output(home, cloud, "push", home.bento)
    assert [item.uploads for item in cloud.items.values()] == [1, 1, 1]
    assert len(cloud.calls_to("PUT", "/upload")) == 3


def test_a_killed_push_is_resumed(home: Home, start: Start) -> None:
    cloud = start("proxy")
    cloud.stall = "bento"
    command, env = bentoml_command("push", home.bento), environment(home.path, **cloud.variables)
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as pushing:
        assert cloud.stalled.wait(60)
        pushing.kill()
    bento = cloud.items[key("bento", home.bento)]
    assert (bento.status, bento.uploads) == ("uploading", 0)
    cloud.stall = None
    output(home, cloud, "push", home.bento)
    # The models were complete and the bento was registered: only its files are sent.
    assert {(item.status, item.uploads) for item in cloud.items.values()} == {("success", 1)}
    assert len(cloud.calls_to("POST", "/bentos")) == 1
    assert len(cloud.calls_to("PUT", "/upload")) == 4


def test_a_wrong_token_is_reported(home: Home, start: Start) -> None:
    cloud = start("proxy")
    wrong = cloud.variables | {"BENTO_CLOUD_API_KEY": "another"}
    done = home.run("push", home.bento, **wrong)
    assert done.returncode != 0
    assert "unauthorized" in done.stdout + done.stderr
    assert not cloud.items


def test_a_deployment(home: Home, start: Start) -> None:
    cloud = start("presigned")
    output(home, cloud, "push", "triptych:latest")
    text = output(home, cloud, "deploy", "-f", "deploy/bentocloud.yaml")
    assert 'Deployment "triptych" is ready' in text.replace("\n", " ")
    wanted = yaml.safe_load((ROOT / "deploy/bentocloud.yaml").read_text())
    made = cloud.deployments[wanted["name"]]
    [target] = made["latest_revision"]["targets"]
    assert target["bento"]["version"] == home.bento.partition(":")[2]
    # BentoML drops unknown keys without a warning, so each key of the file has to have arrived.
    assert missing(wanted, target["config"]) == {"name", "bento"}


def missing(wanted: Any, got: Any, where: str = "") -> set[str]:
    """Paths of values that did not arrive."""
    if isinstance(wanted, dict):
        inner = (
            {k} if k not in got else missing(v, got[k], f"{where}{k}.") for k, v in wanted.items()
        )
        return set().union(*inner)
    return set() if wanted == got else {where}


def test_a_deployment_pushes_what_is_missing(home: Home, start: Start, tmp_path: Path) -> None:
    cloud = start("proxy")
    content = yaml.safe_load((ROOT / "deploy/bentocloud.yaml").read_text())
    file = tmp_path / "bentocloud.yaml"
    file.write_text(yaml.safe_dump(content | {"bento": home.bento}))
    output(home, cloud, "deploy", "-f", os.fspath(file))
    assert len(cloud.calls_to("PUT", "/upload")) == 3
    assert cloud.deployments
