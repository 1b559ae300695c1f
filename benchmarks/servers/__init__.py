"""The servers to measure, by name."""

from __future__ import annotations

from benchmarks.model import bfloat16_model_folder
from benchmarks.servers.base import Server
from benchmarks.servers.llama_cpp import LlamaCpp
from benchmarks.servers.openvino import OpenVINO
from benchmarks.servers.torchserve import TorchServe
from benchmarks.servers.transformers_serve import TransformersServe
from benchmarks.servers.triptych import Triptych

SERVERS: dict[str, Server] = {
    server.name: server
    for server in (
        Triptych("triptych"),
        Triptych("triptych-bf16", model=bfloat16_model_folder),
        Triptych("triptych-int8", weight_quantization="int8"),
        TorchServe("static"),
        TransformersServe("transformers"),
        TransformersServe("transformers-cb", continuous_batching=True),
        LlamaCpp("llama.cpp-f32", "f32"),
        LlamaCpp("llama.cpp-q8", "q8_0"),
        OpenVINO("openvino-f32", "f32"),
        OpenVINO("openvino-int8", "int8"),
    )
}
TRIPTYCH_SERVERS = ("triptych", "triptych-bf16", "triptych-int8")
EIGHT_BIT = ("triptych-int8", "llama.cpp-q8", "openvino-int8")
SIXTEEN_BIT = ("triptych-bf16",)


def weight_bits(server: str) -> int:
    """Bits of a weight. Servers with as many are compared; all but the 8-bit compute in float32."""
    return 8 if server in EIGHT_BIT else 16 if server in SIXTEEN_BIT else 32
