"""DeepSpeed's inference config, as `ds-config.json` holds it: what Triptych makes of it.

The keys are those of DeepSpeed's `DeepSpeedInferenceConfig`. What is decided elsewhere (where the
weights lie, how many ranks there are) is taken out or held against it, the rest handed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runners.errors import ConfigError

DTYPES = {
    **dict.fromkeys(("torch.float16", "float16", "fp16", "half", "torch.half"), "float16"),
    **dict.fromkeys(("torch.bfloat16", "bfloat16", "bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("torch.float32", "float32", "fp32", "float", "torch.float"), "float32"),
}
"""DeepSpeed's names of types, and ours."""

NO_USE = {
    "base_dir": "the weights are those of the model folder",
    "checkpoint": "the weights are mapped from the model folder, which costs a rank no more memory",
    "checkpoint_config": "the weights are those of the model folder",
    "ckpt_config": "the weights are those of the model folder",
    "save_mp_checkpoint_path": "nothing is written",
    "max_out_tokens": "max_kv_tokens bounds the KV cache",
    "max_tokens": "max_kv_tokens bounds the KV cache",
    "min_out_tokens": "max_kv_tokens bounds the KV cache",
    "min_tokens": "max_kv_tokens bounds the KV cache",
    "enable_cuda_graph": "steps change their shape",
}


def read_section(section: object, folder: Path, read: Any) -> dict[str, Any]:
    """The config that a `deepspeed` section names (`config`, `checkpoint`) or holds.

    `read` turns a file into a JSON object. Raises: ConfigError.
    """
    if not isinstance(section, Mapping) or not section.get("config"):
        raise ConfigError(
            "deepspeed: config is missing: the name of DeepSpeed's own config, such as "
            "ds-config.json, or what it holds"
        )
    config = section["config"]
    if isinstance(config, str):
        path = folder / config
        if not path.is_file():
            raise ConfigError(f"deepspeed: config: {path} does not exist")
        config = read(path)
    if not isinstance(config, Mapping):
        raise ConfigError("deepspeed: config must be a file name or an object")
    checkpoint = section.get("checkpoint")
    return {**config, **({"checkpoint": checkpoint} if checkpoint else {})}


def tp_size(config: Mapping[str, Any]) -> int | None:
    """How many ranks the config splits a model over, if it says so. Raises: ConfigError."""
    section = config.get("tensor_parallel", config.get("tp", {}))
    size = section.get("tp_size") if isinstance(section, Mapping) else None
    size = config.get("mp_size") if size is None else size
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError("ds-config.json: tensor_parallel.tp_size must be a whole number from 1")
    return size


def dtype(config: Mapping[str, Any]) -> str | None:
    """The type it computes in, by our name. Raises: ConfigError."""
    given = config.get("dtype")
    if given is None:
        return None
    if given not in DTYPES:
        allowed = ", ".join(sorted(set(DTYPES.values())))
        raise ConfigError(f"ds-config.json: dtype must be one of {allowed}")
    return DTYPES[given]


def warnings(config: Mapping[str, Any]) -> list[str]:
    """One for every key that means nothing here."""
    return [f"ds-config.json: {k} is ignored: {NO_USE[k]}" for k in config if k in NO_USE]


def for_init_inference(
    config: Mapping[str, Any], *, world_size: int, grain: int, on_cpu: bool
) -> dict[str, Any]:
    """What `deepspeed.init_inference` is given, but for the type.

    `grain`: parts are multiples of it, where the config does not say.
    """
    taken = {"dtype", "tensor_parallel", "tp", "mp_size", *NO_USE}
    values = {k: v for k, v in config.items() if k not in taken}
    section = config.get("tensor_parallel", config.get("tp", {}))
    values["tensor_parallel"] = {"tp_grain_size": grain, **section, "tp_size": world_size}
    if on_cpu:  # there are no such kernels for CPUs
        for name in ("replace_with_kernel_inject", "kernel_inject"):
            values.pop(name, None)
    return values
