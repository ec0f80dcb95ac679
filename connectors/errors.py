"""What can go wrong with a hand-off, as types; each message says what was wrong and what is expected."""

from __future__ import annotations


class FlowKVError(Exception):
    """Base of all FlowKV errors; ``kind`` labels the metric that counts it."""

    kind = "transfer"


class HandOffError(FlowKVError):
    """The ``kv_transfer_params`` of a request do not describe a hand-off to this engine."""

    kind = "params"


class IncompatibleError(FlowKVError):
    """The two engines' compatibility records differ; names every field with both values."""

    kind = "handshake"


class PeerUnreachableError(FlowKVError):
    """The peer's control channel did not answer in time."""

    kind = "handshake"


class TransferFailedError(FlowKVError):
    """The byte mover reported an error, or the transfer outlived its deadline."""

    kind = "transfer"


class StaleReadError(FlowKVError):
    """The sender no longer held the blocks when the read ended: the bytes are not the request's."""

    kind = "stale"


class DigestMismatchError(FlowKVError):
    """The bytes that arrived are not the bytes that the sender hashed."""

    kind = "digest"


class MessageError(FlowKVError):
    """A control message is oversized, malformed, unsigned, altered or replayed."""

    kind = "message"
