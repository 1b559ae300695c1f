"""What a safetensors file says of itself in its header, without reading any weights."""

from __future__ import annotations

import json
import operator
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.contracts.errors import IncompleteModel, reraise_as

# The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
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
class Header:
    """The tensors of one file: their names, and how many parameters there are of each type."""

    tensors: frozenset[str]
    parameters: Counter[str]


def read_header(path: Path, name: str) -> Header:
    """Read a header and hold its end against the file's size. Raises: IncompleteModel (`name`)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES:
            raise IncompleteModel(f"{name} is not a safetensors file")
        raw = file.read(length)
    if len(raw) < length:
        raise IncompleteModel(f"{name} is cut off within its header")
    with reraise_as(IncompleteModel, f"{name} has a damaged safetensors header"):
        tensors = json.loads(raw)
        tensors.pop("__metadata__", None)
        end = 8 + length + max((t["data_offsets"][1] for t in tensors.values()), default=0)
        parameters = _count(tensors.values(), most=8 * size)
    if size != end:
        state = "cut off" if size < end else "longer than it should be"
        raise IncompleteModel(f"{name} is {state}: {size} bytes, its header says {end}")
    return Header(frozenset(tensors), parameters)


def summarise(headers: Iterable[Header]) -> tuple[int, str]:
    """The number of parameters and the type that most of them have."""
    total: Counter[str] = Counter()
    for header in headers:
        total.update(header.parameters)
    commonest = total.most_common(1)[0][0] if total else "none"
    return total.total(), DTYPES.get(commonest, commonest.lower())


def _count(tensors: Iterable[dict[str, Any]], *, most: int) -> Counter[str]:
    """Parameters by type, of which a file can have no more than it has bits."""
    parameters: Counter[str] = Counter()
    for tensor in tensors:
        count = 1
        for length in tensor["shape"]:
            count *= operator.index(length)
            if not 0 <= count <= most:
                raise ValueError(f"a shape of more than {most:,} parameters")
        parameters[tensor["dtype"]] += count
    return parameters
