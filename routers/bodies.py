"""Request bodies: what a client may send, and what each server gets of it.

The hand-off protocol is vLLM's: the prefill server gets the request cut down to one token with
``kv_transfer_params`` that ask for a remote decode; the parameters that it answers with go unchanged
into the original request for the decode server.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from penstock.routers.errors import ProxyError

Body = dict[str, Any]

ASK_FOR_HANDOFF: Body = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

RESERVED = ("kv_transfer_params", "ec_transfer_params")
"""They tell a server which peer to read from: only the proxy may set them."""

NOT_FOR_PREFILL = frozenset(
    {
        "stream_options",
        "min_tokens",
        "n",
        "best_of",
        "echo",
        "logprobs",
        "top_logprobs",
        "logprob_token_ids",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "stop",
        "stop_token_ids",
    }
)
"""They shape the answer, and the prefill server's answer is thrown away."""


class Mode(StrEnum):
    """Where a request runs."""

    HANDOFF = "handoff"
    """Prefill on a prefill server, the rest on a decode server."""
    PREFILL_ONLY = "prefill_only"
    """All of it on a prefill server: it generates at most one token, so there is nothing to move."""
    DECODE_ONLY = "decode_only"
    """All of it on a decode server: it needs something that a moved KV cache does not give."""


def parse_body(raw: bytes) -> Body:
    """Decode a request body and refuse what no server may see.

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
    xargs = body.get("vllm_xargs")
    for key in RESERVED:
        if body.get(key) is not None:
            raise ProxyError(400, f"{key} must not be set by a client: the proxy sets it")
        if isinstance(xargs, dict) and key in xargs:
            raise ProxyError(400, f"vllm_xargs.{key} must not be set by a client: the proxy sets it")
    return body


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


def token_limit(body: Body) -> object:
    """What the client gave as the most tokens to generate; None where it gave nothing."""
    limit = body.get("max_completion_tokens")
    return body.get("max_tokens") if limit is None else limit


def mode_of(body: Body) -> Mode:
    """Where ``body`` has to run.

    * Prompt logprobs (``echo`` with ``logprobs`` asks for them too) need the prompt's forward pass on the
      server that answers.
    * Beam search makes its own requests inside the engine, all with the same transfer parameters.
    * ``truncate_prompt_tokens: -1`` may cut the prompt by ``max_tokens``, which differs between the sides.
    * Prompt embeddings are tensors, possibly several, that the proxy cannot tell apart.
    """
    limit = token_limit(body)
    if type(limit) is int and 0 <= limit <= 1:
        return Mode.PREFILL_ONLY
    truncate = body.get("truncate_prompt_tokens")
    if (
        body.get("prompt_logprobs") is not None
        or (body.get("echo") and body.get("logprobs") is not None)
        or body.get("use_beam_search")
        or body.get("prompt_embeds") is not None
        or (truncate is not None and (type(truncate) is not int or truncate < 0))
    ):
        return Mode.DECODE_ONLY
    return Mode.HANDOFF


def prefill_body(body: Body, *, chat: bool) -> Body:
    """``body`` cut down to the prompt's forward pass and one token.

    The token must end the request by length: a server hands nothing over for one that is aborted by a stop
    string, so stop conditions are left out. ``min_tokens`` could forbid the end after one token.
    """
    cut = {key: value for key, value in body.items() if key not in NOT_FOR_PREFILL}
    cut |= {
        "max_tokens": 1,
        "stream": False,
        "ignore_eos": True,
        "kv_transfer_params": ASK_FOR_HANDOFF,
    }
    if chat:
        cut["max_completion_tokens"] = 1
    return cut


def decode_body(body: Body, kv_transfer_params: Body | None) -> Body:
    """``body`` with the prefill server's parameters, or as it is where that server handed nothing over."""
    return body if kv_transfer_params is None else body | {"kv_transfer_params": kv_transfer_params}


def handed_over(raw: bytes) -> Body | None:
    """``kv_transfer_params`` of a prefill server's answer; None where it hands nothing over.

    Raises:
        ValueError: the answer is no JSON object, or the parameters are no object.
    """
    try:
        answer = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ValueError("its answer is not JSON") from None
    if not isinstance(answer, dict):
        raise ValueError("its answer is no JSON object")
    params = answer.get("kv_transfer_params")
    if params is not None and not isinstance(params, dict):
        raise ValueError("kv_transfer_params in its answer is no object")
    return params
