"""Messages of the control channel between a decode server (asks) and a prefill server (answers).

The two that carry a compatibility record skip fields of later versions, so that the record can be compared;
the others refuse them.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from penstock.connectors.compat import CompatibilityRecord, Mismatch
from penstock.connectors.errors import MessageError
from penstock.connectors.geometry import CacheGeometry

MAX_QUESTION_BYTES = 1 << 18
MAX_ANSWER_BYTES = 64 << 20
MAX_ENDPOINT_BYTES = 1 << 20
MAX_LEASES = 4096

M = TypeVar("M")
LeaseId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
LeaseIds = Annotated[list[LeaseId], msgspec.Meta(max_length=MAX_LEASES)]
Rank = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
Reason = Annotated[str, msgspec.Meta(max_length=1024)]


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A receiving rank introduces itself to the sending rank of the same number."""

    rank: Rank
    record: CompatibilityRecord


class Renew(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="renew"):
    """The receiver still wants these leases."""

    leases: LeaseIds


class EndOfRead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="end_of_read"):
    """One rank's read has ended: was the lease held until now?"""

    lease: LeaseId
    rank: Rank


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="release"):
    """The receiver no longer wants these leases."""

    leases: LeaseIds
    reason: Reason = ""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The sending rank's memory and how to reach it."""

    instance: LeaseId
    record: CompatibilityRecord
    geometry: CacheGeometry
    transport: Annotated[str, msgspec.Meta(max_length=64)]
    endpoint: Annotated[bytes, msgspec.Meta(max_length=MAX_ENDPOINT_BYTES)]


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """The sender will not serve the question; names every field that differs where records do."""

    reason: Reason
    mismatches: list[Mismatch] = []


class Renewed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="renewed"):
    """Leases that were renewed, less those that are no longer held."""

    lost: LeaseIds


class Confirmed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="confirmed"):
    """The lease was held until the read ended. ``digests``: little-endian uint64 a block, or empty."""

    digests: Annotated[bytes, msgspec.Meta(max_length=MAX_ANSWER_BYTES)] = b""


class NotYet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="not_yet"):
    """The sender has not hashed the blocks yet; ask again."""


class Stale(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="stale"):
    """The lease was not held until the read ended."""


class Released(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="released"):
    """How many of the leases were still held."""

    count: int


Question = Hello | Renew | EndOfRead | Release
Answer = Welcome | Refused | Renewed | Confirmed | NotYet | Stale | Released

_encoder = msgspec.msgpack.Encoder()
_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Question | Answer) -> bytes:
    """One message as msgpack."""
    return _encoder.encode(message)


def decode_question(frame: bytes) -> Question:
    """Parse what a receiver sent. Raises :class:`MessageError` for anything else."""
    return _decode(_questions, frame, MAX_QUESTION_BYTES)


def decode_answer(frame: bytes) -> Answer:
    """Parse what a sender answered. Raises :class:`MessageError` for anything else."""
    return _decode(_answers, frame, MAX_ANSWER_BYTES)


def _decode(decoder: msgspec.msgpack.Decoder[M], frame: bytes, limit: int) -> M:
    if len(frame) > limit:
        raise MessageError(f"message of {len(frame)} bytes; at most {limit} are allowed")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise MessageError(f"malformed message: {error}") from error
