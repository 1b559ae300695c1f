"""DeepSpeed's inference config, as `ds-config.json` holds it: what Triptych makes of it.

The keys are those of DeepSpeed's `DeepSpeedInferenceConfig`. What is decided elsewhere (where the
weights lie, how many ranks there are) is taken out or held against it, the rest handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runners.contracts.errors import ConfigError

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
    "quant": "weight_quantization is what is offered",
    "zero": "weights are split over the ranks, or placed by engine accelerate",
    **dict.fromkeys(
        ("injection_policy", "injection_policy_tuple", "injection_dict"),
        "a policy names classes, which a file can not",
    ),
    **dict.fromkeys(
        ("moe", "moe_experts", "moe_type", "ep_size", "ep_group", "ep_mp_group"),
        "every rank holds a part of every expert",
    ),
    **dict.fromkeys(("expert_group", "expert_mp_group"), "every rank holds a part of every expert"),
}


KEYS = frozenset(
    {
        *("replace_with_kernel_inject", "kernel_inject", "dtype", "tensor_parallel", "tp"),
        *("use_triton", "triton_autotune", "triangular_masking", "tm", "keep_module_on_host"),
        *("set_empty_params", "return_tuple", "training_mp_size", "replace_method"),
        *("transposed_mode", "mp_size", "mpu"),
        *NO_USE,
    }
)
"""Every key of `DeepSpeedInferenceConfig`, but for `config`, by which a section names a file."""


KERNELS = ("replace_with_kernel_inject", "kernel_inject")
"""Both of DeepSpeed's names for it."""


def read_section(
    section: object, folder: Path, read: Callable[[Path], Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's config out of a `deepspeed` section, and a warning for every key of no use.

    The section is that config, or names it as TorchServe's does: `config` is a file in `folder`, or
    the config itself. `read` turns a file into an object. Raises: ConfigError.
    """
    if not isinstance(section, Mapping):
        raise ConfigError("deepspeed must hold keys and values")
    config = section.get("config", section)
    if isinstance(config, str):
        path = folder / config
        if not path.is_file():
            raise ConfigError(f"deepspeed: config: {path} does not exist")
        config = read(path)
    if not isinstance(config, Mapping):
        raise ConfigError("deepspeed: config must be a file name or an object")
    if config is not section:
        config = {**config, **{k: v for k, v in section.items() if k != "config"}}
    warnings = [f"ds-config.json: {k} is ignored: {NO_USE[k]}" for k in config if k in NO_USE]
    unknown = [k for k in config if k not in KEYS]
    warnings += [f"ds-config.json: unknown key {k} is ignored" for k in unknown]
    return {k: v for k, v in config.items() if k in KEYS and k not in NO_USE}, warnings


def tp_size(config: Mapping[str, Any]) -> int | None:
    """How many ranks the config splits a model over, if it says so. Raises: ConfigError."""
    size = _tensor_parallel(config).get("tp_size", config.get("mp_size"))
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError("ds-config.json: tensor_parallel.tp_size must be a whole number from 1")
    return size


def _tensor_parallel(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Any = next(
        (config[k] for k in ("tensor_parallel", "tp") if config.get(k) is not None), {}
    )
    if not isinstance(found, Mapping):
        raise ConfigError('ds-config.json: tensor_parallel must be an object: {"tp_size": 2}')
    return found


def dtype(config: Mapping[str, Any]) -> str | None:
    """The type it computes in, by our name. Raises: ConfigError."""
    given = config.get("dtype")
    if given is None:
        return None
    if not isinstance(given, str) or given not in DTYPES:
        allowed = ", ".join(sorted(set(DTYPES.values())))
        raise ConfigError(f"ds-config.json: dtype must be one of {allowed}")
    return DTYPES[given]


def asks_for_kernels(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's own kernels are to be put in."""
    return any(config.get(name) for name in KERNELS)


def for_init_inference(
    config: Mapping[str, Any], *, world_size: int, grain: int, inject: bool
) -> dict[str, Any]:
    """What `deepspeed.init_inference` is given, but for the type.

    `grain`: parts are multiples of it, where the config does not say. `inject`: whether its kernels
    are put in.
    """
    taken = {"dtype", "tensor_parallel", "tp", "mp_size", *NO_USE}
    values = {k: v for k, v in config.items() if k not in taken}
    parallel = {"tp_grain_size": grain, **_tensor_parallel(config), "tp_size": world_size}
    values["tensor_parallel"] = parallel
    return {k: v for k, v in values.items() if k not in KERNELS} | {KERNELS[0]: inject}
