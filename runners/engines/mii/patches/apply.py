"""Which parts of MII are replaced, and by what. Called by importing the package."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# MII and DeepSpeed read the environment when they are imported.
import deepspeed.ops
import mii.api
import mii.backend
import mii.backend.server
import mii.batching
import mii.modeling.models
import mii.utils
import zmq
from mii.batching import ragged_batching
from mii.batching.data_classes import Request, RequestBatch
from mii.grpc_related import modelresponse_server, task_methods

from runners.engines.mii.deployment.proto import pack
from runners.engines.mii.deployment.registry import private_cache
from runners.engines.mii.patches.batching import PatchedAsyncPipeline, PatchedPipeline
from runners.engines.mii.patches.loading import on_gpu, patched_load_model
from runners.engines.mii.patches.server import DetachedServer, patched_parse_kwargs
from runners.engines.mii.patches.servicer import ResponseServicer, serve_on_loopback
from runners.engines.mii.patches.sockets import LoopbackContext
from runners.engines.mii.patches.source_check import check_source

ORIGINALS: dict[str, tuple[Callable[..., Any] | type, str]] = {
    "RaggedBatchBase": (ragged_batching.RaggedBatchBase, "2c869fd85237"),
    "MIIPipeline": (ragged_batching.MIIPipeline, "3146399e7b75"),
    "MIIAsyncPipeline": (ragged_batching.MIIAsyncPipeline, "535bbbc7ed92"),
    "Request": (Request, "588e41666384"),
    "RequestBatch": (RequestBatch, "72e6e3f261f5"),
    "ModelResponse": (modelresponse_server.ModelResponse, "dab631fe383a"),
    "_do_serve": (modelresponse_server._do_serve, "6c300aa77dea"),
    "serve_inference": (modelresponse_server.serve_inference, "2163f0a2b1be"),
    "load_model": (mii.modeling.models.load_model, "2f2b2b8e8879"),
    "MIIServer": (mii.backend.server.MIIServer, "b347730345ff"),
    "serve": (mii.api.serve, "4c5f92bcead6"),
    "_parse_kwargs_to_mii_config": (mii.api._parse_kwargs_to_mii_config, "4d5af6398a8e"),
    "kwarg_dict_to_proto": (mii.utils.kwarg_dict_to_proto, "863c04b165e1"),
    "TextGenerationMethods": (task_methods.TextGenerationMethods, "0e6f1e7db5e5"),
}
"""What patches replace, wrap or derive from, with the digest of its source in MII 0.3.3."""


class ModuleOverlay:
    """A module with some of its names replaced, for one module that imports it."""

    def __init__(self, module: object, **replacements: object) -> None:
        self._module = module
        self.__dict__.update(replacements)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@lru_cache(maxsize=1)
def apply() -> None:
    """Patch MII in this process. Raises: EngineUnavailable if MII is of another version."""
    for original, expected in ORIGINALS.values():
        check_source(original, expected)
    private_cache()
    # DeepSpeed would build it for minutes at the first start, under a lock that a killed build
    # leaves behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for module in (mii.modeling.models, mii.api):
        module.load_model = patched_load_model(ORIGINALS["load_model"][0])
    for module in (mii.batching, mii.api):
        module.MIIPipeline, module.MIIAsyncPipeline = PatchedPipeline, PatchedAsyncPipeline
    ragged_batching.zmq = ModuleOverlay(zmq, Context=LoopbackContext)
    # MII sleeps a second for its ranks to connect; `PatchedBatching` waits for each instead.
    ragged_batching.time = ModuleOverlay(time, sleep=lambda _: None)
    if not on_gpu():
        cuda = ModuleOverlay(torch.cuda, synchronize=lambda: None)
        ragged_batching.torch = ModuleOverlay(torch, cuda=cuda)
    modelresponse_server.ModelResponse = ResponseServicer
    modelresponse_server._do_serve = serve_on_loopback
    for module in (mii.utils, task_methods):
        module.kwarg_dict_to_proto = pack
    for module in (mii.backend, mii.backend.server):
        module.MIIServer = DetachedServer
    mii.api._parse_kwargs_to_mii_config = patched_parse_kwargs(
        ORIGINALS["_parse_kwargs_to_mii_config"][0]
    )
