"""TorchServe's `model-config.yaml`, as published with its large-model examples, as RunnerConfig.

The format is TorchServe's (its documentation of `model-archiver` and of large-model inference).
Keys without effect are named in a warning with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runners.config.base import DTYPES
from runners.config.ignored import TORCHSERVE_KEYS, drop_ignored
from runners.config.model import fields_of
from runners.contracts.errors import ConfigError

MODEL_CONFIG = "model-config.yaml"
INDEX_TO_NAME = "index_to_name.json"
"""TorchServe's file of labels. In its example for transformers: `{"0": "negative", ...}` for
text-classification, `{"label_list": "['O', 'B-PER', ...]"}` for token-classification."""

TOP = {
    "batchSize": "max_batch_size",
    "responseTimeout": "step_timeout",
    "startupTimeout": "start_timeout",
}
HANDLER = {"torch_dtype": "dtype"}
"""Keys of TorchServe's section `handler` to our fields of another name."""
NOT_OF_HANDLER = frozenset({"name", "task", "engine", "tensor_parallel", "deepspeed", "mii"})
"""Fields that other sections decide."""
TORCHRUN = {"nnodes": "nnodes", "node-rank": "node_rank", "rdzv-endpoint": "rdzv_endpoint"}
"""Keys of its section `torchrun` to our fields."""


def read_model_config(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content of a `model-config.yaml` as fields of a RunnerConfig, and its warnings.

    Raises: ConfigError.
    """
    rest = {str(k): v for k, v in content.items() if v is not None or k == "deepspeed"}
    values: dict[str, Any] = {}
    handler = _pop_section(rest, "handler")
    for key, field in TOP.items():
        if key in rest:
            values[field] = rest.pop(key)
    values |= _pop_parallel(rest, handler)
    # What a handler read under the name of one of our fields means the same.
    same = {key: key for key in fields_of().keys() & handler.keys() - NOT_OF_HANDLER}
    for key, field in (same | HANDLER).items():
        if key in handler:
            values.setdefault(field, handler.pop(key))
    if isinstance(dtype := values.get("dtype"), str):
        values["dtype"] = DTYPES.get(dtype, dtype)
    rest |= {f"handler.{key}": value for key, value in handler.items()}
    warnings = drop_ignored(rest, TORCHSERVE_KEYS, source=MODEL_CONFIG)
    return values, warnings + [f"{MODEL_CONFIG}: unknown key {key} is ignored" for key in rest]


def _pop_parallel(rest: dict[str, Any], handler: dict[str, Any]) -> dict[str, Any]:
    """How the model is split, and by which engine; the keys that say it are removed."""
    parallel_type = rest.pop("parallelType", None)
    if parallel_type not in (None, "tp", "custom"):
        raise ConfigError(
            f"{parallel_type} is not supported, only tp is; engine accelerate places whole layers "
            "on several GPUs",
            field="parallelType",
            source=MODEL_CONFIG,
        )
    torchrun = _pop_section(rest, "torchrun")
    values: dict[str, Any] = {}
    if "deepspeed" not in rest and "tensor_parallel" in handler:
        values = _mii(handler, torchrun)
    elif "deepspeed" in rest:
        section = _pop_section(rest, "deepspeed")
        if not section.get("config"):
            raise ConfigError(
                "is missing: the name of DeepSpeed's own config, such as ds-config.json",
                field="deepspeed.config",
                source=MODEL_CONFIG,
            )
        values = _deepspeed(section, torchrun)
    elif parallel_type == "tp":
        # The handlers of such files split the model themselves (torch's tensor parallelism).
        values = _deepspeed({}, torchrun)
    rest |= {f"torchrun.{key}": value for key, value in torchrun.items()}
    return values


def _deepspeed(section: dict[str, Any], torchrun: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"engine": "deepspeed", "deepspeed": section}
    per_node = torchrun.pop("nproc-per-node", None)
    values |= {field: torchrun.pop(key) for key, field in TORCHRUN.items() if key in torchrun}
    if per_node is not None:
        count = values.get("nnodes", 1)
        whole = isinstance(per_node, int) and isinstance(count, int)
        values["tensor_parallel"] = per_node * count if whole else per_node
    return values


def _mii(handler: dict[str, Any], torchrun: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the handler of the MII text example passes to `mii.pipeline`."""
    size = handler.pop("tensor_parallel")
    per_node = torchrun.pop("nproc-per-node", size)
    if str(per_node) != str(size):
        raise ConfigError(
            f"torchrun's nproc-per-node is {per_node}, but handler.tensor_parallel is {size}: they "
            "must be equal",
            source=MODEL_CONFIG,
        )
    section = {"max_length": handler.pop("max_length")} if "max_length" in handler else {}
    return {"engine": "mii", "tensor_parallel": size, "mii": section}


def _pop_section(content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.pop(name, None)
    section = {} if section is None else section
    if not isinstance(section, dict):
        raise ConfigError("must be a mapping", field=name, source=MODEL_CONFIG)
    return {k: v for k, v in section.items() if v is not None}
