"""TorchServe's `model-config.yaml`, as its large-model examples were published, in today's words.

The format is TorchServe's (its documentation of `model-archiver` and of large-model inference).
What ranks with continuous batching have no use for is named in a warning that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runners.config.deepspeed import DTYPES
from runners.contracts.errors import ConfigError

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
    **dict.fromkeys(
        ("torchrun.nnodes", "torchrun.node-rank", "torchrun.rdzv-endpoint"),
        "engine deepspeed alone splits a model over machines",
    ),
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
    values |= _parallel(left, handler)
    for key, field in HANDLER.items():
        if key in handler:
            values.setdefault(field, handler.pop(key))
    if isinstance(dtype := values.get("dtype"), str):
        values["dtype"] = DTYPES.get(dtype, dtype)
    left |= {f"handler.{key}": value for key, value in handler.items()}
    for key in left:
        why = NO_USE.get(key)
        warnings.append(
            f"{MODEL_CONFIG}: {key} is ignored: {why}"
            if why
            else f"{MODEL_CONFIG}: unknown key {key} is ignored"
        )
    return values, warnings


def _parallel(left: dict[str, Any], handler: dict[str, Any]) -> dict[str, Any]:
    """How the model is split, and by what; takes what it understands out of both."""
    kind = left.pop("parallelType", None)
    if kind not in (None, "tp", "custom"):
        raise ConfigError(
            f"{MODEL_CONFIG}: parallelType {kind} is not offered: only tp is; engine accelerate "
            "places whole layers on several GPUs"
        )
    torchrun = _section(left, "torchrun")
    values: dict[str, Any] = {}
    if "deepspeed" not in left and "tensor_parallel" in handler:
        values = _mii(handler, torchrun)
    elif "deepspeed" in left or kind == "tp":
        values = _deepspeed(_section(left, "deepspeed"), torchrun)
    left |= {f"torchrun.{key}": value for key, value in torchrun.items()}
    return values


def _deepspeed(section: dict[str, Any], torchrun: dict[str, Any]) -> dict[str, Any]:
    if not section.get("config"):
        raise ConfigError(
            f"{MODEL_CONFIG}: deepspeed: config is missing: the name of DeepSpeed's own config, "
            "such as ds-config.json"
        )
    values: dict[str, Any] = {"engine": "deepspeed", "deepspeed": section}
    per_node = torchrun.pop("nproc-per-node", None)
    values |= {field: torchrun.pop(key) for key, field in TORCHRUN.items() if key in torchrun}
    if per_node is not None:
        count = values.get("nnodes", 1)
        whole = isinstance(per_node, int) and isinstance(count, int)
        values["tensor_parallel"] = per_node * count if whole else per_node
    return values


def _mii(handler: dict[str, Any], torchrun: dict[str, Any]) -> dict[str, Any]:
    """What the MII example for text has its handler give to `mii.pipeline`."""
    size = handler.pop("tensor_parallel")
    per_node = torchrun.pop("nproc-per-node", size)
    if str(per_node) != str(size):
        raise ConfigError(
            f"{MODEL_CONFIG}: torchrun's nproc-per-node is {per_node}, but handler.tensor_parallel "
            f"is {size}: they must be equal"
        )
    section = {"max_length": handler.pop("max_length")} if "max_length" in handler else {}
    return {"engine": "mii", "tensor_parallel": size, "mii": section}


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.pop(name, None)
    section = {} if section is None else section
    if not isinstance(section, dict):
        raise ConfigError(f"{MODEL_CONFIG}: {name} must hold keys and values")
    return {k: v for k, v in section.items() if v is not None}
