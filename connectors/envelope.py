"""Sealed frames: with a shared key, a control message proves who sent it and that it is fresh.

A frame is msgpack of (wall-clock seconds, 16 random bytes, the nonce answered or empty, body, HMAC-SHA256
over all of these and the direction). A question is accepted once within ``WINDOW_S`` of its time stamp; an
answer only by the asker that awaits its nonce. Without a key the frame has the same shape and no proof.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

import msgspec

from penstock.connectors.errors import MessageError

WINDOW_S = 60.0
"""Largest accepted difference between two hosts' clocks, and the time for which nonces are remembered."""

Nonce = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One message on the wire."""

    sent_s: float
    nonce: Nonce
    answers: Annotated[bytes, msgspec.Meta(max_length=16)]
    body: bytes
    proof: Annotated[bytes, msgspec.Meta(max_length=32)] = b""


_decoder = msgspec.msgpack.Decoder(Frame)


class Seal:
    """Seals and opens frames with one shared key.

    Args:
        key: the secret, or None for unsigned frames.
        wall_clock: seconds since the epoch, as ``time.time``.
    """

    def __init__(self, key: str | None, wall_clock: Callable[[], float]) -> None:
        self._key = key.encode() if key else None
        self._wall_clock = wall_clock
        self._seen: OrderedDict[bytes, float] = OrderedDict()

    def seal(self, body: bytes, answers: bytes = b"") -> tuple[bytes, bytes]:
        """The frame for ``body`` and its nonce; ``answers`` is the nonce of the question that it answers."""
        frame = Frame(self._wall_clock(), secrets.token_bytes(16), answers, body)
        sealed = msgspec.structs.replace(frame, proof=self._proof(frame))
        return msgspec.msgpack.encode(sealed), sealed.nonce

    def open_question(self, data: bytes) -> Frame:
        """Check a frame that asks something; the same one is refused a second time.

        Raises:
            MessageError: malformed, an answer, unsigned, altered, replayed, or outside the time window.
        """
        frame = self._open(data)
        if frame.answers:
            raise MessageError("message is an answer where a question is expected")
        if self._key is None:
            return frame
        now = self._wall_clock()
        if not abs(now - frame.sent_s) <= WINDOW_S:  # refuses NaN too
            raise MessageError(
                f"message is {now - frame.sent_s:.0f} s old; at most {WINDOW_S:.0f} s are allowed"
            )
        while self._seen and now - next(iter(self._seen.values())) > 2 * WINDOW_S:
            self._seen.popitem(last=False)
        if frame.nonce in self._seen:
            raise MessageError("message was replayed")
        self._seen[frame.nonce] = now
        return frame

    def open_answer(self, data: bytes) -> Frame:
        """Check a frame that answers; the caller matches ``answers`` with what it asked.

        Raises:
            MessageError: malformed, unsigned or altered.
        """
        frame = self._open(data)
        if not frame.answers:
            raise MessageError("message answers nothing")
        return frame

    def _open(self, data: bytes) -> Frame:
        try:
            frame = _decoder.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise MessageError(f"malformed frame: {error}") from error
        if self._key is not None and not hmac.compare_digest(frame.proof, self._proof(frame)):
            raise MessageError("message is unsigned or was altered")
        return frame

    def _proof(self, frame: Frame) -> bytes:
        if self._key is None:
            return b""
        head = struct.pack("<dB", frame.sent_s, len(frame.answers)) + frame.nonce + frame.answers
        return hmac.digest(self._key, head + frame.body, "sha256")
