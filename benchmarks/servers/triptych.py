"""Triptych: `bentoml serve` of this working tree."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from benchmarks.cache import ROOT, Unavailable, cached, run
from benchmarks.client import Dialect, OpenAICompletions
from benchmarks.model import model_folder
from benchmarks.servers.base import Launch, executable

MODEL = "bench"


class Triptych:
    """`settings` go into the model's `setup_config.json`, `variables` into the environment."""

    ready_path = "/readyz"

    def __init__(
        self,
        name: str,
        *,
        model: Callable[[], Path] = model_folder,
        variables: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        self.name = name
        self._model = model
        self._variables = dict(variables or {})
        self._settings = settings
        self._home = Path()

    def dialect(self) -> Dialect:
        """OpenAI completions, with end tokens ignored."""
        return OpenAICompletions(MODEL, ignore_eos=True, stream_options={"include_usage": True})

    def prepare(self) -> str:
        """Import the model into a separate model store. Raises: Unavailable."""
        from runners.config.model import fields_of

        unknown = self._settings.keys() - fields_of().keys()
        if unknown:
            raise Unavailable(f"this version has no {', '.join(sorted(unknown))}")
        self._home = cached(f"stores/{self.name}", self._import)
        return version("triptych")

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """With default settings, except for the number of threads and the batch size."""
        return Launch(
            [executable("bentoml"), "serve", ".", "--host", "127.0.0.1"],
            store_at(self._home)
            | {
                "PORT": str(port),
                "TRIPTYCH_TEXT_MODEL": MODEL,
                "TRIPTYCH_NUM_THREADS": str(threads),
                "TRIPTYCH_MAX_BATCH_SIZE": str(concurrency),
            }
            | self._variables,
        )

    def _import(self, home: Path) -> None:
        setup = home / "settings.json"
        setup.write_text(json.dumps(self._settings))
        command = [executable("python"), "-m", "model_store_scripts.import_model"]
        command += [str(self._model()), "--name", MODEL, "--setup-config", str(setup)]
        run(command, cwd=ROOT, env=os.environ | store_at(home))


def store_at(home: Path) -> dict[str, str]:
    """The environment variables that select the model store in folder `home`."""
    return {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
