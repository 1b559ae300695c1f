"""DeepSpeed-MII's OpenAI-compatible server, if it is installed. Not yet run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.cache import Unavailable
from benchmarks.client import Dialect, OpenAICompletions
from benchmarks.servers.base import Launch, executable


class MII:
    """MII's default settings on one GPU."""

    ready_path = "/health"

    def __init__(self, name: str, model: Callable[[], Path]) -> None:
        self.name = name
        self._model = model

    def dialect(self) -> Dialect:
        """OpenAI completions with `top_k=1`, as MII always samples; its streams have no usage."""
        return OpenAICompletions(str(self._model()), sends_usage=False, top_k=1, temperature=1)

    def prepare(self) -> str:
        """Nothing to install. Raises: Unavailable if MII is not installed."""
        try:
            return version("deepspeed-mii")
        except PackageNotFoundError:
            raise Unavailable("DeepSpeed-MII is not installed") from None

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """The server starts the deployment itself."""
        command = [executable("python"), "-m", "mii.entrypoints.openai_api_server"]
        command += ["--model", str(self._model()), "--host", "127.0.0.1", "--port", str(port)]
        return Launch(command)
