"""DeepSpeed's inference config, as in `ds-config.json`, and what is passed on to DeepSpeed.

The keys are those of DeepSpeed's `DeepSpeedInferenceConfig`. Keys that Triptych decides (weights,
number of ranks) are removed or compared, the others are passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runners.config.base import DTYPES
from runners.config.ignored import DS_CONFIG_KEYS, drop_ignored
from runners.contracts.errors import ConfigError

DS_CONFIG = "ds-config.json"

KEYS = frozenset(
    {
        *("replace_with_kernel_inject", "kernel_inject", "dtype", "tensor_parallel", "tp"),
        *("use_triton", "triton_autotune", "triangular_masking", "tm", "keep_module_on_host"),
        *("set_empty_params", "return_tuple", "training_mp_size", "replace_method"),
        *("transposed_mode", "mp_size", "mpu"),
        *DS_CONFIG_KEYS,
    }
)
"""Every key of `DeepSpeedInferenceConfig` except `config`, which names a file in a section."""


KERNELS = ("replace_with_kernel_inject", "kernel_inject")
"""Both of DeepSpeed's names for it."""


def read_section(
    section: object, folder: Path, read: Callable[[Path], Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's config from a `deepspeed` section, and a warning for every ignored key.

    The section is that config, or names it as in TorchServe: `config` is a file in `folder`, or the
    config itself. `read` turns a file into an object. Raises: ConfigError.
    """
    if not isinstance(section, Mapping):
        raise ConfigError("must be an object", field="deepspeed")
    config = section.get("config", section)
    if isinstance(config, str):
        path = folder / config
        if not path.is_file():
            raise ConfigError(f"{path} does not exist", field="deepspeed.config")
        config = read(path)
    if not isinstance(config, Mapping):
        raise ConfigError("must be a file name or an object", field="deepspeed.config")
    if config is not section:
        config = {**config, **{k: v for k, v in section.items() if k != "config"}}
    values = {k: v for k, v in config.items() if k in KEYS}
    warnings = drop_ignored(values, DS_CONFIG_KEYS, source=DS_CONFIG)
    warnings += [f"{DS_CONFIG}: unknown key {k} is ignored" for k in config if k not in KEYS]
    return values, warnings


def tp_size(config: Mapping[str, Any]) -> int | None:
    """Number of ranks in the config; None if it has none. Raises: ConfigError."""
    size = _tensor_parallel(config).get("tp_size", config.get("mp_size"))
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(
            "must be an integer from 1", field="tensor_parallel.tp_size", source=DS_CONFIG
        )
    return size


def without_tp_size(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without its number of ranks."""
    values = {k: v for k, v in config.items() if k not in ("mp_size", "tp", "tensor_parallel")}
    parallel = {k: v for k, v in _tensor_parallel(config).items() if k != "tp_size"}
    return values | ({"tensor_parallel": parallel} if parallel else {})


def _tensor_parallel(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section: Any = next(
        (config[k] for k in ("tensor_parallel", "tp") if config.get(k) is not None), {}
    )
    if not isinstance(section, Mapping):
        raise ConfigError(
            'must be an object: {"tp_size": 2}', field="tensor_parallel", source=DS_CONFIG
        )
    return section


def dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype in the config, by our name; None if it has none. Raises: ConfigError."""
    name = config.get("dtype")
    if name is None:
        return None
    if not isinstance(name, str) or name not in DTYPES:
        allowed = ", ".join(sorted(set(DTYPES.values())))
        raise ConfigError(f"must be one of {allowed}", field="dtype", source=DS_CONFIG)
    return DTYPES[name]


def asks_for_kernels(config: Mapping[str, Any]) -> bool:
    """Whether the config requests DeepSpeed's kernels."""
    return any(config.get(name) for name in KERNELS)


def for_init_inference(
    config: Mapping[str, Any], *, world_size: int, grain: int, inject: bool
) -> dict[str, Any]:
    """The arguments of `deepspeed.init_inference`, except the dtype.

    `grain`: the size of a part is a multiple of it, unless the config has another. `inject`:
    whether DeepSpeed replaces modules by its kernels.
    """
    replaced = {"dtype", "tensor_parallel", "tp", "mp_size", *DS_CONFIG_KEYS}
    values = {k: v for k, v in config.items() if k not in replaced}
    parallel = {"tp_grain_size": grain, **_tensor_parallel(config), "tp_size": world_size}
    values["tensor_parallel"] = parallel
    return {k: v for k, v in values.items() if k not in KERNELS} | {KERNELS[0]: inject}
