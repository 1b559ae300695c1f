"""MII's gRPC messages, without importing MII, and the values that MII's protocol lacks.

MII's `Value` has neither lists nor null. A list is sent as a dictionary of its items under "0",
"1" ..., which stock clients can send too. Null is left out. The token ids of a text are in an
additional field, which stock clients skip.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

from runners.contracts.errors import EngineUnavailable
from runners.engines.mii.deployment.ports import LOOPBACK, port_taken

SERVICE = "/modelresponse.ModelResponse/"
MAX_MESSAGE_BYTES = 2**27
"""MII's own limit."""
OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A lost replica comes back soon, but gRPC's default pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
# With the default, two servers could listen on one port and would each get some of the requests.
SERVER_OPTIONS = [*OPTIONS, ("grpc.so_reuseport", 0)]
TOKEN_IDS = 100
"""Number of the additional field of MII's `SingleGenerationReply`: token ids, as packed varints."""

_MODULE = "mii.grpc_related.proto.modelresponse_pb2"


@lru_cache(maxsize=1)
def messages() -> Any:
    """MII's generated messages. Raises: EngineUnavailable if it is not installed."""
    if _MODULE in sys.modules:
        return sys.modules[_MODULE]
    package = importlib.util.find_spec("mii")
    if package is None or not package.submodule_search_locations:
        raise EngineUnavailable("DeepSpeed-MII is not installed; `make setup` installs it")
    file = Path(package.submodule_search_locations[0], "grpc_related/proto/modelresponse_pb2.py")
    spec = importlib.util.spec_from_file_location("modelresponse_pb2", file)
    if spec is None or spec.loader is None:
        raise EngineUnavailable(f"{file}, a file of DeepSpeed-MII, cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bind(server: Any, port: int) -> None:
    """Make a gRPC server listen on loopback. Raises: ConfigError if the port is taken."""
    try:
        server.add_insecure_port(f"{LOOPBACK}:{port}")
    except RuntimeError:
        raise port_taken(port) from None


def request(prompts: Sequence[str], kwargs: Mapping[str, Any]) -> Any:
    """A `MultiStringRequest`. Raises: TypeError for a value of a type that it cannot hold."""
    return messages().MultiStringRequest(request=prompts, query_kwargs=pack(kwargs))


def pack(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as MII's `Value`s."""
    return {name: _value(value) for name, value in kwargs.items() if value is not None}


def _value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, Mapping):
        return messages().Value(mvalue=messages().Dictionary(values=pack(value)))
    fields = {bool: "bvalue", int: "ivalue", float: "fvalue", str: "svalue"}
    if type(value) not in fields:
        raise TypeError(f"a {type(value).__name__} cannot be sent to MII")
    return messages().Value(**{fields[type(value)]: value})


def with_tokens(reply: Any, token_ids: Sequence[int]) -> Any:
    """Add the token ids of its text to a `SingleGenerationReply`."""
    if token_ids:
        packed = b"".join(map(_varint, token_ids))
        reply.MergeFromString(_varint(TOKEN_IDS << 3 | 2) + _varint(len(packed)) + packed)
    return reply


def tokens_of(reply: Any) -> list[int] | None:
    """The token ids that `with_tokens` added; None if there are none, as from stock MII."""
    for field in UnknownFieldSet(reply):
        if field.field_number == TOKEN_IDS:
            return _unpack_varints(field.data)
    return None


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _unpack_varints(packed: bytes) -> list[int]:
    numbers, number, shift = [], 0, 0
    for byte in packed:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(number)
            number, shift = 0, 0
    return numbers
