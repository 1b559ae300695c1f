"""DeepSpeed-MII's OpenAI-compatible server, where it is installed beside us. Not yet run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.cache import Unavailable
from benchmarks.client import Dialect, OpenAICompletions
from benchmarks.servers.base import Launch, executable


class MII:
    """One GPU, MII's defaults."""

    ready_path = "/health"

    def __init__(self, name: str, model: Callable[[], Path]) -> None:
        self.name = name
        self._model = model

    def dialect(self) -> Dialect:
        """It always samples, so greedy is a choice among one; streams carry no usage."""
        return OpenAICompletions(str(self._model()), sends_usage=False, top_k=1, temperature=1)

    def prepare(self) -> str:
        """Raises: Unavailable unless it is installed."""
        try:
            return version("deepspeed-mii")
        except PackageNotFoundError:
            raise Unavailable("DeepSpeed-MII is not installed") from None

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """Its server starts its own deployment."""
        command = [executable("python"), "-m", "mii.entrypoints.openai_api_server"]
        command += ["--model", str(self._model()), "--host", "127.0.0.1", "--port", str(port)]
        return Launch(command)
