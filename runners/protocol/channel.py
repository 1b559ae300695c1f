"""Msgpack frames over a unix socket: 4 bytes big-endian length, then the message."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from runners.protocol.messages import HostMessage, RankMessage

MAX_FRAME_BYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct(">I")

_encoder = msgspec.msgpack.Encoder()
_host_decoder = msgspec.msgpack.Decoder(HostMessage)
_rank_decoder = msgspec.msgpack.Decoder(RankMessage)


def encode_frame(message: HostMessage | RankMessage) -> bytes:
    """A message as one frame. Raises: ValueError if it exceeds MAX_FRAME_BYTES."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(payload)} bytes exceeds {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


async def read_rank_message(reader: asyncio.StreamReader) -> RankMessage | None:
    """The next message of a rank; None at the end of the stream.

    Raises: ValueError (which msgspec's errors are) for a frame outside the schema.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
        message: RankMessage = _rank_decoder.decode(await reader.readexactly(length))
        return message
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class RankChannel:
    """A rank's end: blocking receive in one thread, send from any."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._reader = self._socket.makefile("rb")
        self._send_lock = threading.Lock()

    def send(self, message: RankMessage) -> None:
        """Write one message. Raises: OSError when the host is gone."""
        frame = encode_frame(message)
        with self._send_lock:
            self._socket.sendall(frame)

    def __iter__(self) -> Iterator[HostMessage]:
        """Yield the host's messages until it closes the connection."""
        while len(prefix := self._reader.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(prefix)
            payload = self._reader.read(length)
            if len(payload) < length:
                return
            yield _host_decoder.decode(payload)
