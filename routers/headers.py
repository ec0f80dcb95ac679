"""Which headers cross the proxy, in each direction."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from multidict import CIMultiDict

REQUEST_ID = "X-Request-Id"

TO_SERVERS = frozenset(
    {
        "authorization",
        "baggage",
        "traceparent",
        "tracestate",
        "user-agent",
        "x-b3-flags",
        "x-b3-parentspanid",
        "x-b3-sampled",
        "x-b3-spanid",
        "x-b3-traceid",
        "x-session-id",
        "x-smg-routing-key",
        "x-vllm-priority",
    }
)
"""A list of what passes, not of what does not: a header that steers an engine's internals (a data-parallel
rank, a transfer peer) stays outside."""

TO_SERVERS_PREFIXES = ("x-llm-d-",)

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110, section 7.6.1."""

NOT_TO_CLIENT = HOP_BY_HOP | {"date", "server"}

MAX_REQUEST_ID = 256
"""Characters of a client's request id that are kept; it travels through logs and control messages."""


def request_id_of(headers: Mapping[str, str]) -> str:
    """The client's request id, or a new one."""
    given = headers.get(REQUEST_ID, "").strip()[:MAX_REQUEST_ID]
    return given if given and given.isascii() and given.isprintable() else uuid.uuid4().hex


def to_server(headers: Mapping[str, str], request_id: str) -> CIMultiDict[str]:
    """Headers for both servers of a request. ``identity``: bytes are passed on as they are, so unpacked."""
    out = CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() in TO_SERVERS or name.lower().startswith(TO_SERVERS_PREFIXES)
    )
    out[REQUEST_ID] = request_id
    out["Content-Type"] = "application/json"
    out["Accept-Encoding"] = "identity"
    return out


def to_client(headers: Mapping[str, str], request_id: str) -> CIMultiDict[str]:
    """A server's headers, less those that belong to its own connection."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    out = CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in NOT_TO_CLIENT and name.lower() not in named
    )
    out.setdefault(REQUEST_ID, request_id)
    return out
