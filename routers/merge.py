"""Many single answers made into the one that a server would give: choice numbers, one id, summed usage."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from penstock.routers.bodies import Body
from penstock.routers.parts import Part

DONE = b"[DONE]"


async def events_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event (WHATWG HTML, section 9.2.6), comments and other fields left out."""
    buffer = b""
    data: list[bytes] = []
    async for chunk in chunks:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r")
            if text.startswith(b"data:"):
                data.append(text[5:].removeprefix(b" "))
            elif not text and data:
                yield b"\n".join(data)
                data = []


def parse_object(raw: bytes) -> Body:
    """A JSON object of a server.

    Raises:
        ValueError: it is something else.
    """
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get("choices", []), list):
        raise ValueError("it is no object with choices")
    return value


class Merger:
    """Collects what belongs to the whole; ``request_id`` is the client's, parts append their index to it."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._usages: dict[int, Body] = {}
        self._first_of_prompt: dict[int, bool] = {}
        self._head: Body | None = None
        self._id = ""

    def event(self, part: Part, data: bytes) -> bytes | None:
        """The event to send for one of a part's events; None for one that waits for the other parts.

        Raises:
            ValueError: the event is none of a completion.
        """
        chunk = parse_object(data)
        self._name(part, chunk)
        if not chunk.get("choices") and isinstance(chunk.get("usage"), dict):
            self._take_usage(part, chunk)
            return None
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def stream_end(self) -> bytes:
        """What follows the last part's last event."""
        end = b"data: " + DONE + b"\n\n"
        if self._head is None:
            return end
        return b"data: " + msgspec.json.encode(self._head | {"usage": self.usage()}) + b"\n\n" + end

    def whole(self, answers: list[tuple[Part, bytes]]) -> bytes:
        """The JSON answer made of the parts' answers.

        Raises:
            ValueError: one of them is no completion.
        """
        choices = []
        for part, raw in sorted(answers, key=lambda answer: answer[0].index):
            answer = parse_object(raw)
            self._name(part, answer)
            self._take_usage(part, answer)
            choices += answer.get("choices", [])
        assert self._head is not None
        return msgspec.json.encode(self._head | {"choices": choices, "usage": self.usage()})

    def usage(self) -> Body:
        """Prompt tokens once a prompt, completion tokens of every answer: vLLM's own count."""
        leaders = [usage for index, usage in self._usages.items() if self._first_of_prompt[index]]
        prompt = sum(count_in(usage, "prompt_tokens") for usage in leaders)
        completion = sum(count_in(usage, "completion_tokens") for usage in self._usages.values())
        total: Body = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        details = [d for usage in leaders if isinstance(d := usage.get("prompt_tokens_details"), dict)]
        if details:
            total["prompt_tokens_details"] = {
                "cached_tokens": sum(count_in(d, "cached_tokens") for d in details)
            }
        return total

    def _name(self, part: Part, answer: Body) -> None:
        own = answer.get("id")
        if isinstance(own, str):
            named = own.replace(part_id(self._request_id, part), self._request_id)
            # SGLang invents ids; there the first part's stands for all.
            self._id = self._id or named
            answer["id"] = self._id
        for choice in answer.get("choices", []):
            if isinstance(choice, dict):
                choice["index"] = part.index

    def _take_usage(self, part: Part, answer: Body) -> None:
        usage = answer.get("usage")
        self._usages[part.index] = usage if isinstance(usage, dict) else {}
        self._first_of_prompt[part.index] = part.choice == 0
        if self._head is None:
            self._head = answer


def part_id(request_id: str, part: Part) -> str:
    """The request id that a part has at the servers."""
    return f"{request_id}-{part.index}"


def count_in(usage: Body, key: str) -> int:
    """A count of ``usage``, 0 where it is absent."""
    value = usage.get(key)
    return value if isinstance(value, int) else 0
