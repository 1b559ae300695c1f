"""A BentoML home with models and a bento of them, as a user has before deploying."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.server import ROOT, bentoml_command, environment

SPLIT = {"engine": "deepspeed", "tensor_parallel": 2, "max_batch_size": 8, "start_timeout": 120}


@dataclass(frozen=True)
class Home:
    """A BentoML home, and the tags of its models and bento."""

    path: Path
    split: str
    """A text model over two ranks."""
    plain: str
    """A text model that asks for no GPU."""
    image: str
    large: str
    """Not a model, but larger than one part of an upload."""
    bento: str = ""
    """Built with `split` and `image`."""

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `bentoml`, from the repository."""
        command, env = bentoml_command(*arguments), environment(self.path, **variables)
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
        )


def stored(name: str, folder: Path, setup: dict[str, object]) -> str:
    """Put a model into the store; returns its tag."""
    import bentoml

    with bentoml.models.create(name) as model:
        shutil.copytree(folder, Path(model.path, "model"))
        Path(model.path, "setup_config.json").write_text(json.dumps(setup))
    return str(model.tag)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The models and the bento; read-only for the tests."""
    from tests.support.model_store import store_at, write_pipeline

    work = tmp_path_factory.mktemp("deploy")
    image, text = write_pipeline(work / "image"), work / "text"
    text.mkdir()
    (text / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    shutil.copy(image / "unet/diffusion_pytorch_model.safetensors", text / "model.safetensors")
    sparse = work / "sparse"
    sparse.mkdir()
    with (sparse / "weights").open("wb") as file:
        file.truncate(101 * 2**20)
    with store_at(work / "home"):
        made = Home(
            work / "home",
            split=stored("split", text, SPLIT),
            plain=stored("plain", text, {"gpus": 0}),
            image=stored("diffusion", image, {"max_batch_images": 4}),
            large=stored("large", sparse, {}),
        )
    chosen = ("--arg", "text_model=split", "--arg", "image_model=diffusion")
    done = made.run("build", ".", "-o", "tag", *chosen)
    assert done.returncode == 0, done.stderr
    [tag] = re.findall(r"triptych:\w+", done.stdout)
    return replace(made, bento=tag)


@pytest.fixture
def store(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """The home as the stores of this process, without the developer's `TRIPTYCH_*` variables."""
    # Imported here: pytest ignores BentoML's warnings only after it has loaded this file.
    from bentoml._internal.bento import BentoStore
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    from settings import get_settings

    for name in [n for n in os.environ if n.startswith("TRIPTYCH_") or n == "PORT"]:
        monkeypatch.delenv(name)
    BentoMLContainer.model_store.set(ModelStore(home.path / "models"))
    BentoMLContainer.bento_store.set(BentoStore(home.path / "bentos"))
    yield home
    BentoMLContainer.model_store.reset()
    BentoMLContainer.bento_store.reset()
    get_settings.cache_clear()


Render = Callable[..., str]


@pytest.fixture
def render(
    store: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Render:
    """`python -m deploy.render`: its output, or its error."""
    from deploy.render import main
    from settings import get_settings

    def run(*arguments: str, **variables: str) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        get_settings.cache_clear()
        code = main(arguments)
        out, err = capsys.readouterr()
        assert (code == 0) != bool(err), err
        assert not (out and err)
        return out or err

    return run
