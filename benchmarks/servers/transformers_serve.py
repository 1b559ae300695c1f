"""`transformers serve`, of the same version of transformers that Triptych uses."""

from __future__ import annotations

from importlib.metadata import version

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

    def __init__(self, name: str, *, continuous_batching: bool = False) -> None:
        self.name = name
        self._continuous = continuous_batching

    def dialect(self) -> Dialect:
        """OpenAI completions. It rejects unknown fields, and always sends usage."""
        return OpenAICompletions(str(model_folder()))

    def prepare(self) -> str:
        """Nothing to install."""
        return version("transformers")

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """With the KV cache limited as for llama.cpp; the default is all free memory."""
        command = [executable("transformers"), "serve", str(model_folder())]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--device", "cpu", "--dtype", "float32", "--attn-implementation", "sdpa"]
        if self._continuous:
            blocks = concurrency * CONTEXT_PER_REQUEST // BLOCK_TOKENS
            command += [
                "--continuous-batching",
                "--cb-block-size",
                str(BLOCK_TOKENS),
                "--cb-num-blocks",
                str(blocks),
            ]
            command += ["--cb-max-batch-tokens", str(STEP_TOKENS)]
        return Launch(command, {"OMP_NUM_THREADS": str(threads)})
