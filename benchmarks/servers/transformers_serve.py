"""`transformers serve`, of the same version of transformers that Triptych uses."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from benchmarks.client import Dialect, OpenAICompletions
from benchmarks.model import model_folder
from benchmarks.servers.base import CONTEXT_PER_REQUEST, Launch, executable

BLOCK_TOKENS = 256
"""Its default size of a KV block."""
STEP_TOKENS = 512
"""Triptych's default `max_step_tokens`."""


class TransformersServe:
    """With continuous batching, or without: then it processes one request at a time."""

    ready_path = "/health"

    def __init__(
        self,
        name: str,
        *,
        continuous_batching: bool = False,
        model: Callable[[], Path] = model_folder,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.name = name
        self._model = model
        self._device, self._dtype = device, dtype
        self._continuous = continuous_batching

    def dialect(self) -> Dialect:
        """OpenAI completions. It rejects unknown fields, and always sends usage."""
        return OpenAICompletions(str(self._model()))

    def prepare(self) -> str:
        """Nothing to install."""
        return version("transformers")

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """With the KV cache limited on a CPU as for llama.cpp; the default is all free memory."""
        command = [executable("transformers"), "serve", str(self._model())]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--device", self._device, "--dtype", self._dtype]
        if self._continuous:
            command += ["--continuous-batching"]
        if self._device == "cpu":
            command += ["--attn-implementation", "sdpa"]
        if self._continuous and self._device == "cpu":
            blocks = concurrency * CONTEXT_PER_REQUEST // BLOCK_TOKENS
            command += ["--cb-block-size", str(BLOCK_TOKENS), "--cb-num-blocks", str(blocks)]
            command += ["--cb-max-batch-tokens", str(STEP_TOKENS)]
        return Launch(command, {"OMP_NUM_THREADS": str(threads)})
