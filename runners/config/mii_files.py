"""What files say of MII: the section `mii` in all its published forms, as RunnerConfig.

TorchServe's MII handler named the section `mii_config` and wrote MII's legacy keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runners.config.base import DTYPES
from runners.config.ignored import MII_GENERATE_KEYS, MII_KEYS, drop_ignored
from runners.config.mii import FASTGEN_BLOCK, MIISection, normalise
from runners.contracts.errors import ConfigError

SOURCE = "setup_config.json"

LEGACY_SECTIONS = ("mii_config", "mii_configs")
"""Names of the section in the files and in the code of TorchServe's MII handler."""

TOP_LEVEL_KEYS = (MIISection.model_fields.keys() | MII_KEYS.keys()) - {"max_length"}
"""Keys of the section that a file for that handler may have at its top level too."""

STARTED_ONLY = (
    *("deployment_name", "device_map", "replica_configs", "torch_dist_port", "zmq_port_number"),
    *("restful_api_host", "restful_api_port", "restful_processes"),
)
"""Keys that have an effect only where a deployment is started."""


def is_legacy(raw: Mapping[str, Any]) -> bool:
    """Whether a file without `engine` is one for TorchServe's MII handler: it has `model_name` and
    `task`, or the handler's section."""
    return any(key in raw for key in LEGACY_SECTIONS) or {"model_name", "task"} <= raw.keys()


def read_section(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A file's values with one section `mii`, and outside it the fields that every engine has
    (`tensor_parallel`, `dtype`, `max_batch_size` ...).

    Returns the values and a warning for each ignored key. Raises: ConfigError.
    """
    fields = dict(values)
    if isinstance(fields.get("dtype"), str):
        fields["dtype"] = DTYPES.get(fields["dtype"], fields["dtype"])
    raw = _pop_section(fields)
    top_level = {k: fields.pop(k) for k in TOP_LEVEL_KEYS & fields.keys()}
    section = _flatten(top_level | {k: v for k, v in raw.items() if v is not None})
    if "task" in fields:
        fields["task"] = normalise(fields["task"])
    if (record := fields.pop("model_name", None)) is not None:
        section.setdefault("model_name_or_path", record)
    warnings = drop_ignored(section, MII_KEYS, source=SOURCE, prefix="mii.")
    warnings += _ignored(section)
    for key, value in _pop_shared(section).items():
        if fields.setdefault(key, value) != value:
            raise ConfigError(
                f"is {fields[key]}, but mii has {value}: they must be equal",
                field=key,
                source=SOURCE,
            )
    return fields | {"mii": section}, warnings


def drop_section(values: dict[str, Any]) -> list[str]:
    """Remove what concerns MII's text generation, for a model of another task.

    Returns a warning for each key.
    """
    keys = [f"mii.{key}" for key in values.pop("mii", {}) if key != "model_name_or_path"]
    if values.pop("tensor_parallel", 1) != 1:
        keys.append("tensor_parallel")
    reason = f"MII serves text generation only; {values['task']} runs as on engine accelerate"
    return [f"{SOURCE}: {key} is ignored: {reason}" for key in keys]


def _pop_section(fields: dict[str, Any]) -> Mapping[str, Any]:
    names = [key for key in ("mii", *LEGACY_SECTIONS) if fields.get(key) is not None]
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} are the same section: give one", source=SOURCE)
    raw = fields.pop(names[0]) if names else {}
    for key in LEGACY_SECTIONS:
        fields.pop(key, None)
    if not isinstance(raw, Mapping):
        raise ConfigError("must be an object", field=names[0], source=SOURCE)
    return raw


def _flatten(raw: dict[str, Any]) -> dict[str, Any]:
    """Move the keys of MIIConfig's `model_config` or `model_conf` one level up."""
    for key in ("model_config", "model_conf"):
        inner = raw.pop(key, {})
        if not isinstance(inner, Mapping):
            raise ConfigError("must be an object", field=f"mii.{key}", source=SOURCE)
        raw = {**inner, **raw}
    return raw


def _ignored(section: dict[str, Any]) -> list[str]:
    """A warning for each key without effect in the section's mode; MIISection validates them."""
    if section.get("mode", "pipeline") == "pipeline":
        unused = dict.fromkeys(("port_number", *STARTED_ONLY), "it needs mode persistent")
    elif section.get("host") is not None:
        unused = dict.fromkeys(STARTED_ONLY, "the deployment at mii.host is not started here")
    else:
        unused = {}
    if section.get("tokenizer") not in (None, section.get("model_name_or_path")):
        unused["tokenizer"] = "the tokenizer is the one in the model folder"
    generate = section.get("generate")
    warnings = []
    if isinstance(generate, Mapping):
        section["generate"] = generate = dict(generate)
        warnings = drop_ignored(generate, MII_GENERATE_KEYS, source=SOURCE, prefix="mii.generate.")
    return warnings + drop_ignored(dict(section), unused, source=SOURCE, prefix="mii.")


def _pop_shared(section: dict[str, Any]) -> dict[str, Any]:
    """Remove from the section what RunnerConfig has for every engine. Raises: ConfigError."""
    shared: dict[str, Any] = {}
    if (task := section.pop("task", None)) is not None:
        shared["task"] = normalise(task)
    if (dtype := section.pop("dtype", None)) is not None:
        if not isinstance(dtype, str) or dtype not in DTYPES:
            allowed = ", ".join(sorted(set(DTYPES.values())))
            raise ConfigError(f"must be one of {allowed}", field="mii.dtype", source=SOURCE)
        shared["dtype"] = DTYPES[dtype]
    engine = section.get("inference_engine_config")
    engine = dict(engine) if isinstance(engine, Mapping) else {}
    parallel = engine.get("tensor_parallel", engine.get("tp"))
    size = parallel.get("tp_size") if isinstance(parallel, Mapping) else None
    if (size := section.pop("tensor_parallel", size)) is not None:
        shared["tensor_parallel"] = size
    manager = engine.get("state_manager", engine.get("manager"))
    if isinstance(manager, Mapping):
        shared |= _batch_limits(manager)
    generate = section.get("generate")
    if isinstance(generate, Mapping) and generate.get("max_new_tokens") is not None:
        shared["max_new_tokens"] = generate["max_new_tokens"]
    return shared


def _batch_limits(manager: Mapping[str, Any]) -> dict[str, Any]:
    limits = {
        "max_batch_size": manager.get("max_ragged_sequence_count"),
        "max_step_tokens": manager.get("max_ragged_batch_size"),
    }
    memory = manager.get("memory_config")
    if isinstance(memory, Mapping) and memory.get("mode") == "allocate":
        blocks = memory.get("size")
        limits["max_kv_tokens"] = FASTGEN_BLOCK * blocks if isinstance(blocks, int) else None
    return {name: value for name, value in limits.items() if value is not None}
