"""TorchServe's `model-config.yaml`, as its large-model examples were published, in today's words.

The format is TorchServe's (its documentation of `model-archiver` and of large-model inference).
What ranks with continuous batching have no use for is named in a warning that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runners.deepspeed_config import DTYPES
from runners.errors import ConfigError

MODEL_CONFIG = "model-config.yaml"

TOP = {
    "batchSize": "max_batch_size",
    "responseTimeout": "step_timeout",
}
HANDLER = {
    "max_length": "max_length",
    "max_new_tokens": "max_new_tokens",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "model_path": "model_path",
}
"""TorchServe's keys and ours."""
TORCHRUN = {"nnodes": "nnodes", "node-rank": "node_rank", "rdzv-endpoint": "rdzv_endpoint"}
"""Those of its section `torchrun`."""

NO_USE = {
    "maxBatchDelay": "no request waits for a batch to fill: it joins the running one at once",
    "minWorkers": "one group of ranks holds the model; for more, run more servers",
    "maxWorkers": "one group of ranks holds the model; for more, run more servers",
    "deviceType": "the model goes to the GPUs if there are any, else to the CPU",
    "deviceIds": "set CUDA_VISIBLE_DEVICES",
    "startupTimeout": "set start_timeout in setup_config.json",
    "handler.manual_seed": "each request has its own seed",
    "handler.model_name": "the model is the one in its folder",
}


def read_model_config(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a `model-config.yaml` holds as fields of a RunnerConfig, and its warnings.

    Raises: ConfigError.
    """
    left = {str(k): v for k, v in content.items() if v is not None or k == "deepspeed"}
    values: dict[str, Any] = {}
    warnings: list[str] = []
    handler = _section(left, "handler")
    for key, field in TOP.items():
        if key in left:
            values[field] = left.pop(key)
    for key, field in HANDLER.items():
        if key in handler:
            values.setdefault(field, handler.pop(key))
    if isinstance(dtype := values.get("dtype"), str):
        values["dtype"] = DTYPES.get(dtype, dtype)
    values |= _parallel(left)
    left |= {f"handler.{key}": value for key, value in handler.items()}
    for key in left:
        why = NO_USE.get(key)
        warnings.append(
            f"{MODEL_CONFIG}: {key} is ignored: {why}"
            if why
            else f"{MODEL_CONFIG}: unknown key {key} is ignored"
        )
    return values, warnings


def _parallel(left: dict[str, Any]) -> dict[str, Any]:
    """How the model is split; takes what it understands out of `left`."""
    kind = left.pop("parallelType", None)
    torchrun = _section(left, "torchrun")
    per_node = torchrun.pop("nproc-per-node", None)
    values: dict[str, Any] = {}
    nodes = {f: torchrun.pop(key) for key, f in TORCHRUN.items() if key in torchrun}
    left |= {f"torchrun.{key}": value for key, value in torchrun.items()}
    if "deepspeed" in left:
        values |= {"engine": "deepspeed", "deepspeed": _section(left, "deepspeed")}
    if kind not in (None, "tp", "custom"):
        raise ConfigError(
            f"{MODEL_CONFIG}: parallelType {kind} is not offered: only tp is; engine accelerate "
            "places whole layers on several GPUs"
        )
    if (kind == "tp" or values) and not values.get("deepspeed", {}).get("config"):
        raise ConfigError(
            f"{MODEL_CONFIG}: deepspeed: config is missing: the name of DeepSpeed's own config, "
            "such as ds-config.json"
        )
    if per_node is not None and "deepspeed" in values:
        count = nodes.get("nnodes", 1)
        whole = isinstance(per_node, int) and isinstance(count, int)
        values |= nodes | {"tensor_parallel": per_node * count if whole else per_node}
    elif per_node is not None:
        left["torchrun.nproc-per-node"] = per_node
    return values


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.pop(name, None)
    section = {} if section is None else section
    if not isinstance(section, dict):
        raise ConfigError(f"{MODEL_CONFIG}: {name} must hold keys and values")
    return {k: v for k, v in section.items() if v is not None}
