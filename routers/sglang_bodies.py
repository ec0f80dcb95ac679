"""What SGLang's servers get of a request: both of them the same, with a room in which they meet.

The decode server asks the prefill server's bootstrap server, at ``bootstrap_host`` and ``bootstrap_port``,
where to find the KV cache of ``bootstrap_room``. SGLang numbers the prompts of one request upwards from the
room that is given (``GenerateReqInput._normalize_bootstrap_params``), alike on both sides.
"""

from __future__ import annotations

import secrets
from urllib.parse import urlsplit

import msgspec

from penstock.routers.bodies import Body, shown
from penstock.routers.errors import ProxyError
from penstock.routers.pool import Server

RESERVED = (
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "decode_tp_size",
    "disagg_prefill_dp_rank",
)
"""Only the proxy may set them."""

PER_PROMPT = ("lora_path", "extra_key", "cache_salt")
"""They may be lists with one value for each prompt of a completion."""

ROOMS = 2**63 - 2**31
"""A room is a signed 64-bit integer; above the highest new one there is space for a request's prompts."""


def new_room() -> int:
    """A room that no other request has, and that nobody can guess."""
    return secrets.randbelow(ROOMS)


def meeting(body: Body, prefill: Server, room: int) -> Body:
    """``body`` for a decode server that reads ``room`` at ``prefill``."""
    host = urlsplit(prefill.url).hostname or ""
    return body | {
        "bootstrap_host": f"[{host}]" if ":" in host else host,
        "bootstrap_port": prefill.bootstrap_port,
        "bootstrap_room": room,
    }


def prefill_body(body: Body) -> Body:
    """The decode server's ``body`` for the prefill server, whose answer is one JSON object.

    Everything else stays: the prefill server chooses the first token.
    """
    return {key: value for key, value in body.items() if key != "stream_options"} | {"stream": False}


def refuse_parallel_samples(body: Body) -> None:
    """Refuse a ``/generate`` for several answers to a prompt.

    Raises:
        ProxyError: 400.
    """
    sampling = body.get("sampling_params")
    for params in sampling if isinstance(sampling, list) else [sampling]:
        n = params.get("n") if isinstance(params, dict) else None
        if n not in (None, 1):
            raise ProxyError(
                400,
                f"sampling_params.n must be 1 on /generate, not {shown(n)}: the answers would share one "
                "hand-off; ask for them one by one, or on /v1/completions",
            )


class _FinishReason(msgspec.Struct):
    type: str = ""
    status_code: int | None = None
    message: str = ""


class _MetaInfo(msgspec.Struct):
    finish_reason: _FinishReason | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: int | None = None


class _Event(msgspec.Struct):
    error: _Error | None = None
    meta_info: _MetaInfo | None = None


def failure_in(events: bytes) -> tuple[int, str] | None:
    """Status and message, where a stream that answers 200 begins with the failure of its request.

    SGLang has answered before it knows: an OpenAI route says so in an error object, ``/generate`` in a
    finish reason. None for everything else, refusals (4xx) among them.
    """
    first = events.partition(b"\n")[0]
    if not first.startswith(b"data:"):
        return None
    try:
        event = msgspec.json.decode(first.removeprefix(b"data:"), type=_Event)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    status, message = 0, ""
    if event.error is not None:
        status, message = event.error.code or 0, event.error.message
    elif event.meta_info is not None and (reason := event.meta_info.finish_reason) is not None:
        status, message = (reason.status_code or 0) if reason.type == "abort" else 0, reason.message
    return (status, message) if status >= 500 else None
