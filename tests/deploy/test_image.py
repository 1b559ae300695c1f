"""The image, really built and really served: `make image-test`, as root, with buildah and podman.

No Docker engine takes part. What needs CUDA's base image elsewhere is built from a Debian of our
own making (debootstrap) here, by the same Containerfile, and the bento on top by `bentoml
containerize`. The build may use what the host's own pip is configured with.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import httpx
import psutil
import pytest

from runners.engines.mii.deployment.ports import free_port
from tests.support.processes import alive, wait_until
from tests.support.server import ROOT, bentoml_command, environment

TOOLS = ("buildah", "debootstrap", "podman", "runc")
DEBIAN, PACKAGES = "bookworm", "python3,python3-venv,python3-pip,ca-certificates,curl"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PLAIN, BASE, IMAGE = "localhost/plain", "localhost/triptych-base", "localhost/triptych:1"
# Without systemd, and within another container.
PODMAN = ("--cgroup-manager=cgroupfs", "--runtime=runc", "--events-backend=file")
RUN = ("--detach", "--network=host", "--cgroups=enabled", "--log-driver=k8s-file")
LIMITS = ("--ulimit=nofile=1024:20000", "--ulimit=nproc=4096:4096")
# Of the rendered command: the host's network needs no ports, limits need cgroups of our own, and
# podman's health checks need systemd.
NOT_HERE = re.compile("--(publish|memory|health-.*)")

pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        "TRIPTYCH_IMAGE_TEST" not in os.environ, reason="takes minutes and root: make image-test"
    ),
]


@dataclass(frozen=True)
class Builder:
    """Tools with a storage of their own, which goes with the test."""

    work: Path
    env: dict[str, str]

    def run(self, *command: str, timeout: float = 1800, check: bool = True) -> str:
        """Run one of them, for its output."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(command)}\n{done.stdout}{done.stderr}"[-6000:]
        )
        return done.stdout.strip()


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """Buildah and podman with a storage of their own."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"apt-get install {' '.join(missing)}"
    assert os.geteuid() == 0, "debootstrap needs root"
    work = tmp_path_factory.mktemp("image")
    (work / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{work}/graph"\nrunroot = "{work}/run"\n'
    )
    env = environment(
        work / "bentoml",
        CONTAINERS_STORAGE_CONF=str(work / "storage.conf"),
        BUILDAH_ISOLATION="chroot",
    )
    yield Builder(work, env)
    shutil.rmtree(work, ignore_errors=True)


@pytest.fixture(scope="module")
def base(builder: Builder) -> str:
    """`deploy/Containerfile` over a plain Debian."""
    root = os.environ.get("TRIPTYCH_IMAGE_ROOTFS") or str(builder.work / "rootfs")
    if not Path(root).is_dir():
        builder.run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, root)
    container = builder.run("buildah", "from", "scratch")
    builder.run("buildah", "add", container, root, "/")
    _lend_pip(builder, container)
    builder.run("buildah", "commit", "--rm", container, PLAIN)
    builder.run("buildah", "build", "--build-arg", f"BASE={PLAIN}", "-t", BASE, "deploy")
    return BASE


def _lend_pip(builder: Builder, container: str) -> None:
    """Give an image the certificates and package sources that this machine's pip has."""
    if CERTIFICATES.is_file():
        builder.run("buildah", "copy", container, str(CERTIFICATES), str(CERTIFICATES))
    environment = {
        "SSL_CERT_FILE": str(CERTIFICATES),
        "UV_SYSTEM_CERTS": "1",
        "UV_NATIVE_TLS": "1",
        "UV_HTTP_TIMEOUT": "300",
    }
    configured = builder.run(
        sys.executable, "-m", "pip", "config", "get", "global.find-links", check=False
    )
    for folder in filter(os.path.isdir, configured.split()):
        builder.run("buildah", "copy", container, folder, folder)
        environment |= {"UV_FIND_LINKS": folder, "PIP_FIND_LINKS": folder}
    for name, value in environment.items():
        builder.run("buildah", "config", "--env", f"{name}={value}", container)


@pytest.fixture(scope="module")
def bento(builder: Builder, base: str) -> str:
    """`bentoml build` with both demo models: the bento's tag."""
    python, bentoml = sys.executable, bentoml_command()[0]
    builder.run(python, "-m", "model_store_scripts.make_demo_models")
    chosen = ["--arg", "text_model=demo-text", "--arg", "image_model=demo-image"]
    built = builder.run(bentoml, "build", ".", "-o", "tag", *chosen, "--arg", f"base_image={base}")
    return built.split("__tag__:")[-1]


@pytest.fixture(scope="module")
def image(builder: Builder, bento: str) -> str:
    """`bentoml containerize` of the bento."""
    labels = builder.run(sys.executable, "-m", "deploy.labels", bento).split()
    containerize = (bentoml_command()[0], "containerize", bento, "--backend", "buildah")
    builder.run(*containerize, "-t", IMAGE, *labels)
    return IMAGE


@pytest.fixture
def container(builder: Builder, bento: str, image: str) -> Iterator[tuple[str, str]]:
    """A container of the image, run as `deploy.render` says: its id and its address."""
    port = free_port()
    render = (sys.executable, "-m", "deploy.render", "run", "--bento", bento, "--image", image)
    rendered = replace(builder, env=builder.env | {"PORT": str(port)}).run(*render)
    options = [
        option
        for line in rendered.split("\\\n")[1:]
        if not NOT_HERE.fullmatch((option := shlex.split(line))[0])
    ]
    started = builder.run("podman", *PODMAN, "run", *RUN, *LIMITS, *chain.from_iterable(options))
    try:
        yield started, f"http://127.0.0.1:{port}"
    finally:
        subprocess.run(["podman", *PODMAN, "rm", "-f", started], env=builder.env, check=False)


def test_the_image_serves_text_and_pictures_and_leaves_nothing(
    builder: Builder, container: tuple[str, str]
) -> None:
    name, url = container

    def ready() -> bool:
        state = builder.run("podman", *PODMAN, "inspect", "-f", "{{.State.Running}}", name)
        log = subprocess.run(
            ["podman", *PODMAN, "logs", name], env=builder.env, capture_output=True, text=True
        )
        assert state == "true", f"{log.stdout}{log.stderr}"[-4000:]
        try:
            return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(ready, 180, "the container is ready")
    main = psutil.Process(
        int(builder.run("podman", *PODMAN, "inspect", "-f", "{{.State.Pid}}", name))
    )
    family = [main, *main.children(recursive=True)]
    assert len(family) > 3
    assert {process.uids().real for process in family} == {1034}, "somebody is root"

    asked = {"prompt": "Where does Fenna live?", "max_new_tokens": 8, "temperature": 0}
    text = httpx.post(f"{url}/generate", json=asked, timeout=120)
    assert text.status_code == 200, text.text
    assert text.json()["outputs"][0]["generated_text"].strip()
    wish = {"prompt": "a red circle", "n": 1, "size": "64x64", "seed": 1}
    picture = httpx.post(f"{url}/v1/images/generations", json=wish, timeout=300)
    assert picture.status_code == 200, picture.text
    assert base64.b64decode(picture.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")

    builder.run("podman", *PODMAN, "kill", "--signal", "TERM", name)
    builder.run("podman", *PODMAN, "wait", name, timeout=120)
    status = builder.run("podman", *PODMAN, "inspect", "-f", "{{.State.ExitCode}}", name)
    assert status in ("0", str(128 + signal.SIGTERM)), status
    assert not alive(family)


def test_the_image_says_what_it_needs(builder: Builder, image: str) -> None:
    config = json.loads(builder.run("buildah", "inspect", "--type", "image", image))["OCIv1"][
        "config"
    ]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "triptych"
    assert labels["triptych.gpus"] == "0"
    assert re.fullmatch(r"demo-image:\w+\+demo-text:\w+", labels["triptych.models"])
    assert config["User"] == "bentoml"
    variables = dict(each.split("=", 1) for each in config["Env"])
    assert variables["HF_HUB_OFFLINE"] == "1"
