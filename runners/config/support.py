"""Which models this build can serve, by their files alone.

The import commands and the service ask the same functions, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

from runners.contracts.errors import ConfigError, IncompleteModel

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
"""File names, one set of which a tokenizer consists of."""
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
"""transformers reads these with the sentencepiece package, which Triptych does not depend on."""
QUANTIZERS = {
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "aqlm": "aqlm",
    "quanto": "optimum.quanto",
    "eetq": "eetq",
    "hqq": "hqq",
    "torchao": "torchao",
    "spqr": "spqr_quant",
    "vptq": "vptq",
    "quark": "quark",
    "auto-round": "auto_round",
}
"""Method in `quantization_config` to the package with which transformers reads such weights."""
NATIVE_QUANTIZERS = frozenset({"fp8", "mxfp4"})
"""Methods that transformers reads itself."""


def adapter_alone(config: Mapping[str, Any], *, source: str) -> IncompleteModel:
    """The error for a folder that has a PEFT adapter and no model.

    `config`: its `adapter_config.json`.
    """
    kind = "a LoRA adapter" if config.get("peft_type") == "LORA" else "an adapter"
    base = config.get("base_model_name_or_path") or "a base model"
    return IncompleteModel(
        f"{source} has no model, but {kind} for {base}: merge it into that model first (peft's "
        "merge_and_unload and save_pretrained)"
    )


def refuse_unsupported(config: Mapping[str, Any], *, source: str) -> None:
    """Refuse a text model of a kind that no engine runs.

    `config`: its `config.json`. Raises: ConfigError that names what is not supported.
    """
    if config.get("is_encoder_decoder"):
        raise ConfigError(
            f"{source} is an encoder-decoder ({config.get('model_type')}), which no engine serves: "
            "text models are decoders, or encoders with a head for a task"
        )
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    method = str(method)  # a list cannot be looked up
    if method in NATIVE_QUANTIZERS:
        return
    package = QUANTIZERS.get(method)
    if package is None:
        known = ", ".join(sorted({*QUANTIZERS, *NATIVE_QUANTIZERS}))
        raise ConfigError(f"{source} is quantized by {method}, which is none of {known}")
    if find_spec(package.partition(".")[0]) is None:
        raise ConfigError(
            f"{source} is quantized by {method}: reading such weights needs the Python package "
            f"{package}, which is not part of this build; use the model's unquantized weights"
        )


def refuse_without_tokenizer(names: Collection[str], *, prefix: str = "") -> None:
    """Refuse a folder without a tokenizer that this build can read.

    `names`: the files of a model; `prefix`: the folder in it. Raises: IncompleteModel.
    """
    if any(all(prefix + name in names for name in files) for files in TOKENIZERS):
        return
    missing = f"{prefix}tokenizer.json"
    other = next((prefix + name for name in SENTENCEPIECE if prefix + name in names), None)
    if other is None:
        raise IncompleteModel(f"{missing} is missing: the model has no tokenizer")
    if find_spec("sentencepiece") is None:
        raise IncompleteModel(
            f"{missing} is missing: {other} alone needs the sentencepiece package, which is not "
            "part of this build"
        )
