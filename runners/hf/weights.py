"""Facts about stored weights, read from the headers of safetensors files.

Called by the import commands, the deployment plan and the ranks. Never imports torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from runners.contracts.errors import IncompleteModel

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's dtype, as safetensors spells it, and its number of parameters."""

    dtype: str
    size: int


@dataclass(frozen=True)
class Header:
    """The tensors of one safetensors file by name."""

    tensors: Mapping[str, StoredTensor]

    @property
    def parameters(self) -> Counter[str]:
        """The number of parameters by dtype, as safetensors spells it."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            count[tensor.dtype] += tensor.size
        return count


def read_header(path: Path, name: str | None = None) -> Header:
    """Read a file's header, which must match the file's size; no weights are read.

    `name` is what errors call the file; its file name by default.

    Raises: IncompleteModel (truncated, padded or damaged), OSError (unreadable).
    """
    try:
        # "np" needs no torch.
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no dict
            return Header(
                {
                    key: StoredTensor(part.get_dtype(), math.prod(part.get_shape()))
                    for key, part in slices.items()
                }
            )
    except SafetensorError as error:
        raise IncompleteModel(
            f"{name or path.name} is not a complete safetensors file: {error}"
        ) from None


def count_parameters(headers: Iterable[Header]) -> Counter[str]:
    """The number of parameters in several files by dtype, as safetensors spells it."""
    total: Counter[str] = Counter()
    for header in headers:
        total.update(header.parameters)
    return total


def main_dtype(parameters: Counter[str]) -> str:
    """The dtype that most parameters have, as torch spells it; `none` if there are none."""
    if not parameters:
        return "none"
    dtype = parameters.most_common(1)[0][0]
    return _TORCH_NAMES.get(dtype, dtype.lower())
