"""Log probabilities of a prompt, which SGLang's prefill server knows and its decode server does not.

The decode server answers with an empty list (``/generate``) or with those of the generated tokens alone
(``/v1/completions`` with ``echo``); here the prefill server's are put before them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from multidict import CIMultiDict

from penstock.routers.bodies import Body
from penstock.routers.errors import StreamBroken
from penstock.routers.exchange import COMPLETIONS_PATH
from penstock.routers.merge import DONE, events_of
from penstock.routers.upstream import Reply

IN_META_INFO = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
IN_CHOICE = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def wanted(path: str, body: Body) -> bool:
    """Whether ``body`` asks for log probabilities of its prompt."""
    if path == COMPLETIONS_PATH:
        return bool(body.get("echo") and body.get("logprobs"))
    start = body.get("logprob_start_len")
    starts = start if isinstance(start, list) else [start]
    return bool(body.get("return_logprob")) and any(type(s) is int and s >= 0 for s in starts)


@dataclass(slots=True)
class Grafted(Reply):
    """A stream whose events are changed on their way."""

    change: Callable[[bytes], bytes]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The events, each with what ``change`` makes of its data."""
        # Without an explicit class, super() fails in a dataclass with slots.
        async for data in events_of(Reply.chunks(self)):
            try:
                yield b"data: " + (data if data == DONE else self.change(data)) + b"\n\n"
            except ValueError as error:
                raise StreamBroken(f"an event of a decode server cannot be used: {error}") from None


async def graft(reply: Reply, prefill: bytes) -> Reply:
    """A decode server's ``reply`` with the prompt's log probabilities of the whole answer ``prefill``.

    Raises:
        ValueError: one of the two is not what SGLang answers.
        StreamBroken: the decode server broke off.
    """
    source = Source(prefill)
    if reply.is_stream:
        return Grafted(
            reply.status, reply.headers, reply.first, reply.rest, reply.idle_timeout_s, source.change
        )
    headers: CIMultiDict[str] = reply.headers.copy()
    headers.popall("Content-Length", None)
    return Reply(reply.status, headers, source.change(await reply.read()), None, reply.idle_timeout_s)


class Source:
    """The prefill server's answer, by number of the answer that its log probabilities belong to."""

    def __init__(self, prefill: bytes) -> None:
        self._answers = _answers_of(_decoded(prefill))
        self._given: set[int] = set()

    def change(self, raw: bytes) -> bytes:
        """A decode server's answer, or an event of it, with the prompts' log probabilities.

        Raises:
            ValueError: it is not what SGLang answers.
        """
        answer = _decoded(raw)
        for position, one in enumerate(_answers_of(answer)):
            index = one.get("index", position)
            if type(index) is not int or not 0 <= index < len(self._answers):
                raise ValueError(f"answer {index!r} has no prompt")
            self._join(one, self._answers[index], index)
        return msgspec.json.encode(answer)

    def _join(self, one: Body, source: Body, index: int) -> None:
        if isinstance(info := one.get("meta_info"), dict):
            # Every event of /generate has them all again.
            known = source.get("meta_info")
            for key in IN_META_INFO:
                if isinstance(known, dict) and isinstance(lists := known.get(key), list):
                    info[key] = lists + (info.get(key) or [])
        elif isinstance(own := one.get("logprobs"), dict) and index not in self._given:
            self._given.add(index)
            known = source.get("logprobs")
            for key in IN_CHOICE:
                if isinstance(known, dict) and isinstance(lists := known.get(key), list):
                    # Its last token is the first of the answer, which the decode server has as well.
                    own[key] = lists[:-1] + (own.get(key) or [])


def _decoded(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ValueError("it is not JSON") from None


def _answers_of(value: Any) -> list[Body]:
    """The single answers in an answer of ``/generate`` or ``/v1/completions``, an error's none."""
    if isinstance(value, dict) and isinstance(value.get("choices"), list):
        value = value["choices"]
    elif isinstance(value, dict):
        value = [value] if "meta_info" in value else []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError("it holds no answers")
    return value
