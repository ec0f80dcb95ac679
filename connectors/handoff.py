"""The ``kv_transfer_params`` by which a prefill server hands a request to a decode server.

They travel through the HTTP client or proxy, so the decode side treats them as input from outside. The
envelope keys (``do_remote_prefill``, ``do_remote_decode``, ``remote_engine_id`` ...) are vLLM's own, so that
any router that forwards them for stock connectors forwards these too.
"""

from __future__ import annotations

import ipaddress
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import xxhash

from penstock.connectors.errors import HandOffError
from penstock.connectors.runs import Run, count_blocks

MAX_RUNS = 1 << 17
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Hex = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Z85Key = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")]


class Address(NamedTuple):
    """Where a sender's control channel listens."""

    host: str
    port: int
    key: str | None = None
    """Its CURVE public key in Z85; None where both ends know it by their shared key, or speak in clear."""


class HandOff(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prefilled prompt's KV blocks are, and for how long they are promised."""

    remote_engine_id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    remote_request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    remote_host: Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"\A[A-Za-z0-9._:\-]+\Z")]
    remote_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    remote_key: Z85Key | None
    """Public key of the sender's control channel; only who has a hand-off can connect to it."""
    remote_instance: Hex
    """Identity of the prefill process; a restarted server has a new one."""
    remote_lease: Hex
    """Capability to read and release the blocks; random, never guessable."""
    remote_runs: Annotated[
        list[tuple[Annotated[int, msgspec.Meta(ge=0, le=1 << 31)], Count]],
        msgspec.Meta(min_length=1, max_length=MAX_RUNS),
    ]
    """(first block, blocks) of each run of the prompt's blocks, in token order."""
    remote_num_tokens: Count
    """Prompt tokens whose KV the blocks hold."""
    remote_prompt: Hex
    """Fingerprint of the prompt that the blocks hold (see :func:`fingerprint`)."""
    block_size: Count
    tp_size: Count

    @property
    def runs(self) -> list[Run]:
        """The sender's runs, in token order."""
        return [Run(start, length) for start, length in self.remote_runs]

    @property
    def address(self) -> Address:
        """The sender's control channel."""
        return Address(self.remote_host, self.remote_port, self.remote_key)

    def to_params(self) -> dict[str, Any]:
        """The dictionary that the engine returns to the client as ``kv_transfer_params``."""
        return {"do_remote_prefill": True, "do_remote_decode": False, **msgspec.to_builtins(self)}


def check_host(hand_off: HandOff, allowed: Collection[str]) -> None:
    """See that a hand-off's host may be asked. With no list every IP address may, but no name: to look a name
    up takes a name server's time, which whoever sends requests would then have at will.

    Raises:
        HandOffError: it may not.
    """
    host = hand_off.remote_host
    if host in allowed:
        return
    if allowed:
        raise HandOffError(f"remote_host {host!r} is not among allowed_hosts {tuple(allowed)}")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise HandOffError(
            f"remote_host {host!r} is a name; names are looked up only if they are in allowed_hosts"
        ) from None


def parse_hand_off(params: Mapping[str, Any]) -> HandOff:
    """Check ``kv_transfer_params`` from outside.

    Raises:
        HandOffError: a key is missing, of the wrong type or out of range, or the runs do not hold the tokens.
    """
    try:
        hand_off = msgspec.convert(dict(params), HandOff, strict=True)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter for a lone surrogate
        raise HandOffError(f"kv_transfer_params: {error}") from error
    expected = -(-hand_off.remote_num_tokens // hand_off.block_size)
    if (given := count_blocks(hand_off.runs)) != expected:
        raise HandOffError(
            f"kv_transfer_params: remote_runs hold {given} blocks, but {hand_off.remote_num_tokens} tokens "
            f"in blocks of {hand_off.block_size} take {expected}"
        )
    return hand_off


def wants_remote_prefill(params: Mapping[str, Any] | None) -> bool:
    """True for a request whose prompt another server has prefilled."""
    return params is not None and params.get("do_remote_prefill") is True


def wants_remote_decode(params: Mapping[str, Any] | None) -> bool:
    """True for a request whose decoding another server will do."""
    return params is not None and params.get("do_remote_decode") is True


def fingerprint(token_ids: Sequence[int], extras: Sequence[str]) -> str:
    """128 bits over everything that a prompt's KV depends on, as 32 hexadecimal digits.

    Args:
        token_ids: the prompt, each below 2**32.
        extras: what else enters the KV: names of adapters, hashes of images, cache salts.
    """
    digest = xxhash.xxh3_128(array("I", token_ids).tobytes())
    digest.update(msgspec.msgpack.encode(list(extras)))
    return digest.hexdigest()
