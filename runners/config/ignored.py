"""Keys of published configuration files that have no effect here, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MAPPED = "weights are always memory-mapped from the model folder"
_WEIGHTS = "the weights are those of the model folder"
_KV = "max_kv_tokens bounds the KV cache"
_EXPERTS = "every rank holds a part of every expert"
_WORKERS = "one group of ranks holds the model; for more, run more servers"
_AML = "MII no longer deploys to AML"

SETUP_CONFIG_KEYS = {
    "low_cpu_mem_usage": "weights are always memory-mapped from safetensors, never loaded twice",
    "offload_state_dict": "no whole state dict exists while loading: nothing to offload",
}
"""Of a `setup_config.json` for transformers and Accelerate."""

DS_CONFIG_KEYS = {
    "base_dir": _WEIGHTS,
    "checkpoint": "the weights are mapped from the model folder, which costs a rank no more memory",
    **dict.fromkeys(("checkpoint_config", "ckpt_config"), _WEIGHTS),
    "save_mp_checkpoint_path": "nothing is written",
    **dict.fromkeys(("max_out_tokens", "max_tokens", "min_out_tokens", "min_tokens"), _KV),
    "enable_cuda_graph": "the shapes of steps vary",
    "quant": "use weight_quantization",
    "zero": "weights are split over the ranks, or placed by engine accelerate",
    **dict.fromkeys(
        ("injection_policy", "injection_policy_tuple", "injection_dict"),
        "a policy names classes, which a file cannot",
    ),
    **dict.fromkeys(("moe", "moe_experts", "moe_type", "ep_size", "ep_group"), _EXPERTS),
    **dict.fromkeys(("ep_mp_group", "expert_group", "expert_mp_group"), _EXPERTS),
}
"""Of DeepSpeed's inference config."""

MII_KEYS = {
    **dict.fromkeys(("load_with_sys_mem", "meta_tensor", "checkpoint_dict"), _MAPPED),
    **dict.fromkeys(("skip_model_check", "ckpt_config"), _MAPPED),
    **dict.fromkeys(
        ("enable_deepspeed", "enable_zero", "ds_config", "replace_with_kernel_inject"),
        "MII chooses its kernels by the machine",
    ),
    "enable_cuda_graph": "the shapes of steps vary",
    "deploy_rank": "device_map names the GPUs",
    "hf_auth_token": "nothing is fetched while serving",
    "trust_remote_code": "a model with code is refused",
    "provider": "the model folder tells which library it is for",
    "ds_optimize": "image models run as on engine accelerate",
    "ds_zero": "device_map and max_memory place weights, with engine accelerate",
    "max_tokens": "max_length bounds prompt plus output",
    "hostfile": "all replicas run on this machine",
    "version": _AML,
    "instance_type": _AML,
}
"""Of the section `mii`, those of MII's legacy `mii_config` included."""

MII_GENERATE_KEYS = {
    "prompt_length": "each prompt has its own",
    "stream": "the route decides whether an answer is streamed",
}
"""Of `mii.generate`."""

TORCHSERVE_KEYS = {
    "maxBatchDelay": "a request joins the running batch at once",
    **dict.fromkeys(("minWorkers", "maxWorkers"), _WORKERS),
    "deviceType": "the model is placed on the GPUs if there are any, else on the CPU",
    "deviceIds": "set CUDA_VISIBLE_DEVICES",
    **dict.fromkeys(
        ("torchrun.nnodes", "torchrun.node-rank", "torchrun.rdzv-endpoint"),
        "only engine deepspeed splits a model over machines",
    ),
    "handler.manual_seed": "each request has its own seed",
    **dict.fromkeys(
        ("handler.temperature", "handler.top_k", "handler.top_p", "handler.do_sample"),
        "each request has its own, generation_config.json the default",
    ),
    "handler.model_name": "the model is the one in its folder",
}
"""Of TorchServe's `model-config.yaml`."""


def drop_ignored(
    values: dict[str, Any], reasons: Mapping[str, str], *, source: str, prefix: str = ""
) -> list[str]:
    """Remove the keys of `reasons` from `values`; a warning for each that was set."""
    return [
        f"{source}: {prefix}{key} is ignored: {reasons[key]}"
        for key in list(values)
        if key in reasons and values.pop(key) is not None
    ]
