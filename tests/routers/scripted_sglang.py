"""Scripted SGLang servers: a decode server waits for its room, and a prefill server until it was read."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import defaultdict
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from aiohttp import web
from scripted_engines import Body, EngineServer, Site, answer_of, events_of, running_site, tokens_of

PORTS = itertools.count(50_000)
IDS = itertools.count()


@dataclass(slots=True)
class Room:
    """Where two servers meet."""

    filled: asyncio.Event = field(default_factory=asyncio.Event)
    read: asyncio.Event = field(default_factory=asyncio.Event)


class SglangServer(EngineServer):
    """Speaks enough of SGLang's HTTP API. ``info`` is what it says of itself, None for status 401."""

    prefill_at: ClassVar[dict[int, SglangServer]] = {}
    """The prefill servers by bootstrap port."""

    def __init__(self, role: str) -> None:
        super().__init__(role)
        self.bootstrap_port = next(PORTS)
        self.rooms: defaultdict[int, Room] = defaultdict(Room)
        self.well = self.default = prefill_room if role == "prefill" else decode_room
        self.info: Body | None = {
            "disaggregation_mode": role,
            "disaggregation_bootstrap_port": self.bootstrap_port,
        }
        if role == "prefill":
            self.prefill_at[self.bootstrap_port] = self

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/generate", self._handle)
        app.router.add_get("/server_info", self._server_info)

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.Response(status=401) if self.info is None else web.json_response(self.info)


class SwitchingServer(SglangServer):
    """One that may change roles. ``info`` goes on to say what it was started with; a request for its old role
    waits for ever."""

    def __init__(self, role: str) -> None:
        super().__init__(role)
        assert self.info is not None
        self.info["enable_pd_role_switch"] = True
        self.prefill_at[self.bootstrap_port] = self
        self.roles_asked = 0

    def add_routes(self, app: web.Application) -> None:
        super().add_routes(app)
        app.router.add_get("/model_info", self._model_info)

    async def _model_info(self, request: web.Request) -> web.Response:
        self.roles_asked += 1
        return web.json_response({"disaggregation_mode": self.role})

    def switch(self) -> None:
        """Take the other role. Raises AssertionError for a server that is not idle, as SGLang refuses it."""
        assert self.active == 0
        self.role = "decode" if self.role == "prefill" else "prefill"
        self.well = self.default = prefill_room if self.role == "prefill" else decode_room


def rooms_of(body: Body) -> list[int]:
    """The rooms of a request's prompts, numbered as SGLang does."""
    prompts = body.get("text", body.get("prompt"))
    several = isinstance(prompts, list) and not isinstance(prompts[0], int)
    return [body["bootstrap_room"] + i for i in range(len(prompts) if several else 1)]


async def prefill_room(server: EngineServer, request: web.Request, body: Body) -> web.StreamResponse:
    """Fill the rooms, and answer when they were read."""
    assert isinstance(server, SglangServer)
    rooms = [server.rooms[number] for number in rooms_of(body)]
    for room in rooms:
        room.filled.set()
    for room in rooms:
        await room.read.wait()
    return web.json_response(sglang_answer(request, body, tokens=1))


async def decode_room(server: EngineServer, request: web.Request, body: Body) -> web.StreamResponse:
    """Read the rooms, once they are filled, and answer."""
    await read_rooms(body)
    if not body.get("stream"):
        return web.json_response(sglang_answer(request, body))
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for event in sglang_events(request, body):
        await response.write(event)
    await response.write_eof()
    return response


async def read_rooms(body: Body) -> None:
    assert body["bootstrap_host"] == "127.0.0.1"
    prefill = SglangServer.prefill_at[body["bootstrap_port"]]
    for number in rooms_of(body):
        room = prefill.rooms[number]
        await room.filled.wait()
        assert not room.read.is_set(), "a room is read once"
        room.read.set()


def sglang_answer(request: web.Request, body: Body, tokens: int | None = None) -> Any:
    """A whole answer; with ``tokens``, a prefill server's, which alone knows of the prompt."""
    at_prefill = tokens is not None
    asked = body | ({"max_tokens": tokens} if at_prefill else {})
    if request.path != "/generate":
        answer = answer_of(request, asked) | {"id": f"id{next(IDS)}"}
        if body.get("logprobs"):
            said = ["prompt", "tokens"] if body.get("echo") and at_prefill else []
            words = said + tokens_of(asked)
            answer["choices"][0]["logprobs"] = {"tokens": words, "token_logprobs": [-1.0] * len(words)}
        return answer
    texts = body["text"] if isinstance(body["text"], list) else [body["text"]]
    answers = []
    for text in texts:
        words = tokens_of({"prompt": text, "max_tokens": tokens or body["sampling_params"]["max_new_tokens"]})
        info: Body = {"id": f"id{next(IDS)}", "finish_reason": {"type": "length"}}
        if body.get("return_logprob"):
            info["input_token_logprobs"] = [[-0.5, 7, None]] if at_prefill else []
            info["output_token_logprobs"] = [[-1.0, i, None] for i in range(len(words))]
        answers.append({"text": "".join(words), "meta_info": info})
    return answers if isinstance(body["text"], list) else answers[0]


def sglang_events(request: web.Request, body: Body) -> list[bytes]:
    """The events of a streamed answer; those of ``/generate`` repeat what was said before."""
    if request.path != "/generate":
        whole = sglang_answer(request, body)
        logprobs = whole["choices"][0].get("logprobs")
        *events, done = events_of(request, body)
        chunks = [json.loads(event.removeprefix(b"data: ")) | {"id": whole["id"]} for event in events]
        for i, chunk in enumerate(chunks):
            for choice in chunk["choices"] if logprobs else ():
                choice["logprobs"] = {key: values[i : i + 1] for key, values in logprobs.items()}
        return [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [done]
    whole = sglang_answer(request, body)
    words = whole["text"].split(" ")[:-1]
    chunks = [whole | {"text": " ".join(words[: i + 1]) + " "} for i in range(len(words))]
    return [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]


def sglang_site(prefill: int = 1, decode: int = 1, **config: Any) -> AbstractAsyncContextManager[Site]:
    """Scripted SGLang servers behind a proxy."""
    return running_site(prefill, decode, make=SglangServer, **config)


def generation(**fields: Any) -> Body:
    """A body of ``/generate``."""
    return {"text": "hello", "sampling_params": {"max_new_tokens": 3}, **fields}
