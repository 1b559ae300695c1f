"""The image, built and served: `make image-test`, as root, with buildah and podman.

It needs no Docker engine. Instead of CUDA's image, `deploy/Containerfile` starts from a plain
Debian (debootstrap); `bentoml containerize` builds the bento's image on top. The build may use the
package sources that this machine's pip is configured with.
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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import httpx
import psutil
import pytest

from runners.engines.mii.deployment.ports import free_port
from tests.support.processes import alive, wait_until
from tests.support.server import HTTP, ROOT, bentoml_command, environment

TOOLS = ("buildah", "debootstrap", "podman", "runc")
DEBIAN, PACKAGES = "bookworm", "python3,python3-venv,python3-pip,ca-certificates,curl"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PLAIN, BASE, IMAGE = "localhost/plain", "localhost/triptych-base", "localhost/triptych:1"
# For a machine without systemd, inside another container.
PODMAN = ("--cgroup-manager=cgroupfs", "--runtime=runc", "--events-backend=file")
RUN = ("--detach", "--network=host", "--cgroups=enabled", "--log-driver=k8s-file")
LIMITS = ("--ulimit=nofile=1024:20000", "--ulimit=nproc=4096:4096")
# Options of the rendered command that this test drops: the host's network needs no ports, limits
# need cgroups that may be created, and podman's health checks need systemd.
DROPPED = re.compile("--(publish|memory|health-.*)")

pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        "TRIPTYCH_IMAGE_TEST" not in os.environ, reason="needs minutes and root: make image-test"
    ),
]


@dataclass(frozen=True)
class Builder:
    """buildah and podman with a private storage, removed after the tests."""

    work: Path
    env: dict[str, str]

    def run(self, *command: str, timeout: float = 1800, check: bool = True) -> str:
        """Run a command. Returns its output."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(command)}\n{done.stdout}{done.stderr}"[-6000:]
        )
        return done.stdout.strip()


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """Tools whose storage is a temporary folder."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"apt-get install {' '.join(missing)}"
    assert os.geteuid() == 0, "debootstrap needs root"
    work = tmp_path_factory.mktemp("image")
    env = environment(
        work / "bentoml",
        CONTAINERS_STORAGE_CONF=str(work / "storage.conf"),
        BUILDAH_ISOLATION="chroot",
    )
    builder = Builder(work, env)
    # vfs copies all files of an image for each of its layers, but works on any filesystem.
    for driver in ("overlay", "vfs"):
        (work / "storage.conf").write_text(
            f'[storage]\ndriver = "{driver}"\n'
            f'graphroot = "{work}/{driver}"\nrunroot = "{work}/run"\n'
        )
        if container := builder.run("buildah", "from", "scratch", check=driver == "vfs"):
            builder.run("buildah", "rm", container)
            break
    yield builder
    subprocess.run(["rm", "-rf", work], check=False)  # quicker than shutil for a whole system


@pytest.fixture(scope="module")
def base(builder: Builder) -> Iterator[Future[str]]:
    """The base image, built in a thread while the bento is built."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit(_build_base, builder)


def _build_base(builder: Builder) -> str:
    """Build `deploy/Containerfile` over a plain Debian. Returns its name."""
    root = os.environ.get("TRIPTYCH_IMAGE_ROOTFS") or str(builder.work / "rootfs")
    if not Path(root).is_dir():
        builder.run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, root)
    container = builder.run("buildah", "from", "scratch")
    builder.run("buildah", "add", container, root, "/")
    _copy_package_sources(builder, container)
    builder.run("buildah", "commit", "--rm", container, PLAIN)
    builder.run("buildah", "build", "--build-arg", f"BASE={PLAIN}", "-t", BASE, "deploy")
    return BASE


def _copy_package_sources(builder: Builder, container: str) -> None:
    """Give an image the certificates and package sources of this machine's pip."""
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
def bento(builder: Builder, base: Future[str]) -> str:
    """The tag of a bento with both demo models, based on `base`."""
    python, bentoml = sys.executable, bentoml_command()[0]
    builder.run(python, "-m", "model_store_scripts.make_demo_models")
    chosen = ["--arg", "text_model=demo-text", "--arg", "image_model=demo-image"]
    built = builder.run(bentoml, "build", ".", "-o", "tag", *chosen, "--arg", f"base_image={BASE}")
    return built.split("__tag__:")[-1]


@pytest.fixture(scope="module")
def image(builder: Builder, base: Future[str], bento: str) -> str:
    """The image of the bento, by `bentoml containerize`."""
    assert base.result() == BASE
    labels = builder.run(sys.executable, "-m", "deploy.labels", bento).split()
    containerize = (bentoml_command()[0], "containerize", bento, "--backend", "buildah")
    builder.run(*containerize, "-t", IMAGE, *labels)
    return IMAGE


@pytest.fixture
def container(builder: Builder, bento: str, image: str) -> Iterator[tuple[str, str]]:
    """The id and the address of a container, run by the command of `deploy.render`."""
    port = free_port()
    render = (sys.executable, "-m", "deploy.render", "run", "--bento", bento, "--image", image)
    rendered = replace(builder, env=builder.env | {"PORT": str(port)}).run(*render)
    options = [
        option
        for line in rendered.split("\\\n")[1:]
        if not DROPPED.fullmatch((option := shlex.split(line))[0])
    ]
    started = builder.run("podman", *PODMAN, "run", *RUN, *LIMITS, *chain.from_iterable(options))
    try:
        yield started, f"http://127.0.0.1:{port}"
    finally:
        subprocess.run(["podman", *PODMAN, "rm", "-f", started], env=builder.env, check=False)


def test_the_image_serves_text_and_images_and_stops_cleanly(
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
            return HTTP.get(f"{url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(ready, 180, "the container is ready")
    main = psutil.Process(
        int(builder.run("podman", *PODMAN, "inspect", "-f", "{{.State.Pid}}", name))
    )
    family = [main, *main.children(recursive=True)]
    assert len(family) > 3
    assert {process.uids().real for process in family} == {1034}, "a process runs as root"

    request = {"prompt": "Where does Fenna live?", "max_new_tokens": 8, "temperature": 0}
    text = HTTP.post(f"{url}/generate", json=request, timeout=120)
    assert text.status_code == 200, text.text
    assert text.json()["outputs"][0]["generated_text"].strip()
    request = {"prompt": "a red circle", "n": 1, "size": "64x64", "seed": 1}
    images = HTTP.post(f"{url}/v1/images/generations", json=request, timeout=300)
    assert images.status_code == 200, images.text
    assert base64.b64decode(images.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")

    builder.run("podman", *PODMAN, "kill", "--signal", "TERM", name)
    builder.run("podman", *PODMAN, "wait", name, timeout=120)
    status = builder.run("podman", *PODMAN, "inspect", "-f", "{{.State.ExitCode}}", name)
    assert status in ("0", str(128 + signal.SIGTERM)), status
    assert not alive(family)


def test_the_labels_and_variables_of_the_image(builder: Builder, image: str) -> None:
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
