"""What the two managers of a P/D pair tell each other about a room, over SGLang's own sockets.

A *room* is SGLang's number for one request on both servers. Decode introduces itself once to each prefill
server and then says, for each room, that it has pages for it; prefill answers with a hand-off for each chunk
that it has computed. The sockets are SGLang's, so what arrives is input from outside.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from penstock.connectors.compat import CompatibilityRecord
from penstock.connectors.errors import MessageError

TAG = b"FLOWKV"
"""First frame of every message here; SGLang's own begin with other words."""
MAX_AUX_BYTES = 64 << 20

Room = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Agent = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Host = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

M = TypeVar("M")


class Greeting(msgspec.Struct, frozen=True, tag="greeting"):
    """A decode rank introduces itself, before the first room of a prefill rank."""

    agent: Agent
    record: CompatibilityRecord


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="wanted"):
    """A decode rank has pages for a room, and wants what follows the first ``prefix_tokens`` tokens."""

    agent: Agent
    room: Room
    host: Host
    port: Port
    prefix_tokens: Count

    @property
    def endpoint(self) -> str:
        """Host, under the name by which ``CommonKVManager`` looks for whom to notify."""
        return self.host

    @property
    def dst_port(self) -> int:
        """Port, likewise."""
        return self.port

    @property
    def is_dummy(self) -> bool:
        """Every decode rank here receives."""
        return False


class Ending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the last chunk of a room says beside its pages."""

    pages: Count
    """Pages that all chunks of the room hold."""
    aux: list[Annotated[bytes, msgspec.Meta(max_length=MAX_AUX_BYTES)]]
    """The room's row of each of SGLang's metadata buffers: the first output token and what belongs to it."""


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="chunk"):
    """Pages of a room that prefill has computed."""

    room: Room
    first: Count
    """Position of the first of them among the pages that decode wants."""
    hand_off: dict[str, Any] | None
    """A ``HandOff`` of theirs, or None where only the end is told."""
    ending: Ending | None = None


_encoder = msgspec.msgpack.Encoder()
_from_decode: msgspec.msgpack.Decoder[Greeting | Wanted] = msgspec.msgpack.Decoder(Greeting | Wanted)
_from_prefill: msgspec.msgpack.Decoder[Chunk] = msgspec.msgpack.Decoder(Chunk)


def frames(message: Greeting | Wanted | Chunk) -> list[bytes]:
    """A message as the frames of one multipart message."""
    return [TAG, _encoder.encode(message)]


def from_decode(parts: list[bytes]) -> Greeting | Wanted:
    """Parse what a decode server sent. Raises :class:`MessageError` for anything else."""
    return _parse(_from_decode, parts)


def from_prefill(parts: list[bytes]) -> Chunk:
    """Parse what a prefill server sent. Raises :class:`MessageError` for anything else."""
    return _parse(_from_prefill, parts)


def _parse(decoder: msgspec.msgpack.Decoder[M], parts: list[bytes]) -> M:
    if len(parts) != 2 or parts[0] != TAG:
        raise MessageError(f"a message of {len(parts)} frames that begins with {parts[:1]!r:.40}")
    try:
        return decoder.decode(parts[1])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise MessageError(f"malformed message: {error}") from error
