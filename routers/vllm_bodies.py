"""What a vLLM server gets of a request, and what it answers to a prefill.

The prefill server gets the request cut down to one token with ``kv_transfer_params`` that ask for a remote
decode; the parameters that it answers with go unchanged into the original request for the decode server.
"""

from __future__ import annotations

import msgspec

from penstock.routers.bodies import Body, Mode

ASK_FOR_HANDOFF: Body = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

RESERVED = ("kv_transfer_params", "ec_transfer_params")
"""Only the proxy may set them."""

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
