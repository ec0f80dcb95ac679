"""Request bodies as they come from clients, whatever the engine behind."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import msgspec

from penstock.routers.errors import ProxyError

Body = dict[str, Any]


class Mode(StrEnum):
    """Where a request runs."""

    HANDOFF = "handoff"
    """Prefill on a prefill server, the rest on a decode server."""
    PREFILL_ONLY = "prefill_only"
    """All of it on a prefill server: it generates at most one token, so there is nothing to move."""
    DECODE_ONLY = "decode_only"
    """All of it on a decode server: it needs something that a moved KV cache does not give."""


def parse_body(raw: bytes) -> Body:
    """Decode a request body.

    Raises:
        ProxyError: 400, with the reason.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProxyError(400, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise ProxyError(400, "the body is nested too deeply") from None
    if not isinstance(body, dict):
        raise ProxyError(400, f"the body must be a JSON object, not {type(body).__name__}")
    return body


def refuse(body: Body, reserved: Iterable[str]) -> None:
    """Refuse a body with a key that only the proxy may set: it tells a server which peer to read from.

    Raises:
        ProxyError: 400, with the key's name.
    """
    xargs = body.get("vllm_xargs")
    for key in reserved:
        if body.get(key) is not None:
            raise ProxyError(400, f"{key} must not be set by a client: the proxy sets it")
        if isinstance(xargs, dict) and key in xargs:
            raise ProxyError(400, f"vllm_xargs.{key} must not be set by a client: the proxy sets it")


def encode_body(body: Body) -> bytes:
    """The bytes that go to a server."""
    return msgspec.json.encode(body)


def choices_per_prompt(body: Body, limit: int) -> int:
    """``n``, 1 where it is absent.

    Raises:
        ProxyError: 400 when it is no integer from 1 to ``limit``.
    """
    n = body.get("n")
    if n is None:
        return 1
    if type(n) is not int or not 1 <= n <= limit:
        raise ProxyError(400, f"n must be an integer from 1 to {limit}, not {shown(n)}")
    return n


def shown(value: object) -> str:
    """``value`` as JSON, cut to a length that fits into an error message."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
