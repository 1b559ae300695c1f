"""The deploy guide: its commands run as they are written, one after another.

docker, kubectl and Ray's `serve` are stubs that record their arguments, and BentoCloud is the fake.
Everything else is real.
"""

from __future__ import annotations

import doctest
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.deploy.conftest import stored
from tests.support.bentocloud import BentoCloud
from tests.support.manifests import check_compose, check_kubernetes, check_ray
from tests.support.model_store import store_at, write_pipeline
from tests.support.readme import commands
from tests.support.server import ROOT, environment

GUIDE = ROOT / "docs/deploy.md"
STUB = """#!/bin/sh
echo "$(basename "$0") $*" >>"$RECORDS/calls"
case "$*" in
    "apply -f -") cat >"$RECORDS/applied" ;;
    version*) echo '"28.0.0"' ;;
esac
"""


def test_the_commands_of_the_guide_run(tmp_path: Path) -> None:
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(".*"))
    image = write_pipeline(tmp_path / "image")
    with store_at(tmp_path / "home"):
        stored("demo-image", image, {"gpus": 0})
        (text := tmp_path / "text").mkdir()
        (text / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        stored("demo-text", text, {"gpus": 0})
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("docker", "kubectl", "serve"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o700)
    with BentoCloud(tmp_path) as cloud:
        path = os.pathsep.join([str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]])
        env = environment(tmp_path / "home", PATH=path, RECORDS=str(tmp_path), **cloud.variables)
        for code, expected in commands(GUIDE):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                cwd=checkout, env=env, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            same = doctest.OutputChecker().check_output(expected, done.stdout, doctest.ELLIPSIS)
            assert not expected or same, f"expected:\n{expected}\nprinted:\n{done.stdout}"
    assert cloud.deployments
    calls = (tmp_path / "calls").read_text()
    for call in ("docker build -t triptych-base deploy", "docker compose up", "serve deploy"):
        assert call in calls
    assert "--label triptych.gpus=0" in calls
    for name in ("compose.yaml", "compose-of-volume.yaml"):
        check_compose((checkout / name).read_text(), tmp_path)
    check_ray((checkout / "serve.yaml").read_text())
    applied = check_kubernetes((tmp_path / "applied").read_text())
    assert {"Deployment", "ScaledObject", "PodMonitor"} <= set(applied)
    assert (
        yaml.safe_load((ROOT / "deploy/bentocloud.yaml").read_text())["name"] in cloud.deployments
    )
