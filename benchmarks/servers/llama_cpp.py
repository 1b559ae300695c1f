"""llama.cpp's server, built from the source in the llama-cpp-python package."""

from __future__ import annotations

import os
import re
import sys
import tarfile
from pathlib import Path
from typing import Literal

from benchmarks.cache import ROOT, Unavailable, cached, run
from benchmarks.client import Dialect, OpenAICompletions
from benchmarks.model import model_folder
from benchmarks.servers.base import CONTEXT_PER_REQUEST, Launch

PACKAGE = "llama-cpp-python==0.3.36"
SOURCE = "vendor/llama.cpp"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",  # every instruction set of this processor
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}

WeightType = Literal["f32", "q8_0"]
ATTENTION: dict[WeightType, list[str]] = {
    # Without flash attention a float32 KV cache is as fast as the default float16.
    "f32": ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"],
    "q8_0": [],
}


class LlamaCpp:
    """`llama-server` with weights in float32, or in `q8_0`."""

    ready_path = "/health"

    def __init__(self, name: str, weights: WeightType) -> None:
        self.name = name
        self._weights: WeightType = weights

    def dialect(self) -> Dialect:
        """OpenAI completions."""
        return OpenAICompletions("bench", ignore_eos=True, stream_options={"include_usage": True})

    def prepare(self) -> str:
        """Build the server and convert the model. Raises: Unavailable."""
        binary = cached("llama.cpp/build", _build) / "bin" / "llama-server"
        cached(f"llama.cpp/{self._weights}", self._convert)
        match = re.search(r"version: (\S+)", run([str(binary), "--version"]))
        return f"{match[1] if match else 'unknown'} ({PACKAGE.replace('==', ' ')})"

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """One slot of fixed context length per client."""
        folder = cached("llama.cpp/build", _build)
        gguf = cached(f"llama.cpp/{self._weights}", self._convert) / "model.gguf"
        command = [str(folder / "bin" / "llama-server"), "--model", str(gguf)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--threads", str(threads), "--threads-batch", str(threads)]
        command += ["--parallel", str(concurrency), "--cont-batching"]
        command += ["--ctx-size", str(concurrency * CONTEXT_PER_REQUEST), "--no-webui"]
        return Launch(command + ATTENTION[self._weights])

    def _convert(self, folder: Path) -> None:
        run(
            [sys.executable, "-m", "benchmarks.servers.convert_gguf", str(_source()),
             str(model_folder()), "--outfile", str(folder / "model.gguf"),
             "--outtype", self._weights],
            cwd=ROOT,
        )  # fmt: skip


def _source() -> Path:
    return cached("llama.cpp/source", _fetch) / SOURCE


def _fetch(folder: Path) -> None:
    run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
         "--no-binary", "llama-cpp-python", "--dest", str(folder), PACKAGE])  # fmt: skip
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        top = tar.getnames()[0].partition("/")[0]
        tar.extractall(folder, filter="data")
    archive.unlink()
    (folder / top / "vendor").rename(folder / "vendor")
    _keep_tile_configuration(folder / SOURCE)


def _keep_tile_configuration(source: Path) -> None:
    """Add a barrier against a bug of GCC before 13.

    It assumes that `ldtilecfg` reads 8 bytes of the 64 and optimises the others away. With AMX the
    8-bit server would then fail with an illegal instruction.
    """
    file = source / "ggml/src/ggml-cpu/amx/mmq.cpp"
    text = file.read_text()
    load = "    _tile_loadconfig(&tc);\n"
    if text.count(load) != 1:
        raise Unavailable(f"{file.name} is not the version that this patch was made for")
    file.write_text(text.replace(load, '    __asm__ volatile("" ::"r"(&tc) : "memory");\n' + load))


def _build(folder: Path) -> None:
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    run(["cmake", "-S", str(_source()), "-B", str(folder), *options])
    run(["cmake", "--build", str(folder), "--target", "llama-server",
         "--parallel", str(os.cpu_count())])  # fmt: skip
