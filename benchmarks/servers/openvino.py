"""OpenVINO GenAI's continuous batching, behind the HTTP server of `openvino_server.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from benchmarks.cache import cached, packages, run
from benchmarks.client import Dialect, OpenAICompletions
from benchmarks.model import model_folder
from benchmarks.servers.base import CONTEXT_PER_REQUEST, Launch, environment, executable

VERSION = "2026.4.1"
RUNTIME = (
    f"openvino=={VERSION}",
    f"openvino-genai=={VERSION}.0",
    f"openvino-tokenizers=={VERSION}.0",
)
EXPORT = (
    *RUNTIME,
    *("optimum-intel==2.2.0", "optimum==2.3.0", "nncf==3.4.0"),
    # The versions that optimum-intel supports; this environment's are newer.
    *("transformers==5.5.4", "tokenizers==0.22.2", "huggingface-hub==1.21.0"),
    *("requests", "urllib3", "charset-normalizer", "scipy", "scikit-learn", "joblib"),
    *("threadpoolctl", "narwhals", "tabulate", "pydot", "natsort", "jstyleson", "jsonschema"),
)
"""Without openvino-telemetry, which is optional and reports usage."""
SERVER = Path(__file__).with_name("openvino_server.py")

WeightType = Literal["f32", "int8"]
PROPERTIES: dict[WeightType, dict[str, str]] = {
    # By default it computes in bfloat16 with an 8-bit KV cache.
    "f32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "int8": {"INFERENCE_PRECISION_HINT": "f32"},
}


class OpenVINO:
    """OpenVINO with `weights` in float32, or in its default 8 bits with one scale per row."""

    ready_path = "/health"

    def __init__(self, name: str, weights: WeightType) -> None:
        self.name = name
        self._weights: WeightType = weights

    def dialect(self) -> Dialect:
        """OpenAI completions, as served by `openvino_server.py`."""
        return OpenAICompletions("bench")

    def prepare(self) -> str:
        """Install OpenVINO and export the model with optimum-intel. Raises: Unavailable."""
        packages("openvino", *RUNTIME, options=("--no-deps",))
        cached(f"openvino/{self._weights}", self._export)
        return VERSION

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """With an explicit precision, and as many KV tokens per client as for llama.cpp."""
        model = cached(f"openvino/{self._weights}", self._export)
        # -P, because this module would be imported from the script's folder as `openvino`.
        command = [executable("python"), "-P", str(SERVER), str(model), str(port), str(threads)]
        command += [str(concurrency), str(concurrency * CONTEXT_PER_REQUEST)]
        command += [json.dumps(PROPERTIES[self._weights])]
        runtime = packages("openvino", *RUNTIME, options=("--no-deps",))
        return Launch(command, {"PYTHONPATH": str(runtime), "OMP_NUM_THREADS": str(threads)})

    def _export(self, folder: Path) -> None:
        tools = packages("openvino-export", *EXPORT, options=("--no-deps",))
        weight_format = {"f32": "fp32", "int8": "int8"}[self._weights]
        run(
            [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino",
             "--model", str(model_folder()), "--task", "text-generation-with-past",
             "--weight-format", weight_format, str(folder)],
            env=environment({"PYTHONPATH": str(tools)}),
        )  # fmt: skip
