"""What of MII is replaced, in one list. See the package."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# MII and DeepSpeed look at the environment when they are imported.
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

from runners.engines.mii.deployment.places import private_cache
from runners.engines.mii.deployment.proto import pack
from runners.engines.mii.patches.batching import MendedAsyncPipeline, MendedPipeline
from runners.engines.mii.patches.loading import loader, on_gpu
from runners.engines.mii.patches.server import KeptServer, parse
from runners.engines.mii.patches.sockets import LoopbackContext
from runners.engines.mii.patches.source_check import Overlay, check
from runners.engines.mii.patches.wire import Replies, serve_on_loopback

KNOWN: dict[str, tuple[Callable[..., Any] | type, str]] = {
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
"""All that a patch replaces, wraps or builds on, with its fingerprint in MII 0.3.3."""


@lru_cache(maxsize=1)
def apply() -> None:
    """Patch MII in this process. Raises: EngineUnavailable if it is another version's."""
    for patched, expected in KNOWN.values():
        check(patched, expected)
    private_cache()
    # Built at the first start for minutes, under a lock that a killed build leaves behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for module in (mii.modeling.models, mii.api):
        module.load_model = loader(KNOWN["load_model"][0])
    for module in (mii.batching, mii.api):
        module.MIIPipeline, module.MIIAsyncPipeline = MendedPipeline, MendedAsyncPipeline
    ragged_batching.zmq = Overlay(zmq, Context=LoopbackContext)
    ragged_batching.time = Overlay(time, sleep=lambda _: None)  # ranks are waited for by name
    if not on_gpu():
        nothing = Overlay(torch.cuda, synchronize=lambda: None)
        ragged_batching.torch = Overlay(torch, cuda=nothing)
    modelresponse_server.ModelResponse = Replies
    modelresponse_server._do_serve = serve_on_loopback
    for module in (mii.utils, task_methods):
        module.kwarg_dict_to_proto = pack
    for module in (mii.backend, mii.backend.server):
        module.MIIServer = KeptServer
    mii.api._parse_kwargs_to_mii_config = parse(KNOWN["_parse_kwargs_to_mii_config"][0])
