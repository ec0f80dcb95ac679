"""Scripted engine servers on real sockets, and the proxy in front of them."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
from aiohttp import web

from penstock.routers.app import PROXY, Proxy, make_app
from penstock.routers.config import ProxyConfig

Body = dict[str, Any]
Behaviour = Callable[["EngineServer", web.Request, Body], Awaitable[web.StreamResponse]]

PATIENCE_S = 30.0


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; fail after ``PATIENCE_S``."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


def tokens_of(body: Body) -> list[str]:
    """What a scripted decode server generates: words that name the prompt, the seed and their position."""
    prompt = body["messages"][-1]["content"] if "messages" in body else body.get("prompt")
    label = prompt if isinstance(prompt, str) else json.dumps(prompt)
    count = body.get("max_completion_tokens") or body.get("max_tokens") or 3
    return [f"{label}/{body.get('seed')}/{i} " for i in range(count)]


class EngineServer:
    """Speaks enough of vLLM's HTTP API; ``script`` holds the next requests' behaviours."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.requests: list[tuple[str, Body, Mapping[str, str]]] = []
        self.script: list[Behaviour] = []
        self.well: Behaviour = prefill_well if role == "prefill" else decode_well
        self.default = self.well
        self.active = 0
        self.aborted = 0
        self.peak = 0
        self.healthy = True
        self.probes = 0
        self.release = asyncio.Event()
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bodies(self) -> list[Body]:
        return [body for _, body, _ in self.requests]

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/completions", self._handle)
        app.router.add_post("/v1/chat/completions", self._handle)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        self.add_routes(app)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=1024).start()
        self.port = self._runner.addresses[0][1]

    def add_routes(self, app: web.Application) -> None:
        """Routes of another engine."""

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        self.probes += 1
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        self.requests.append((request.path, {}, request.headers.copy()))
        return web.json_response({"object": "list", "data": [{"id": f"model-at-{self.role}"}]})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append((request.path, body, request.headers.copy()))
        behaviour = self.script.pop(0) if self.script else self.default
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            return await behaviour(self, request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.active -= 1


async def prefill_well(server: EngineServer, request: web.Request, body: Body) -> web.StreamResponse:
    """Hand over, with parameters that name this request."""
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[len(server.requests), 7]],
        "remote_engine_id": server.url,
        "remote_request_id": request.headers["X-Request-Id"],
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        "extra": {"nested": [1, None, "ü"]},
    }
    return web.json_response({"choices": [{"text": "discarded"}], "kv_transfer_params": params})


async def decode_well(server: EngineServer, request: web.Request, body: Body) -> web.StreamResponse:
    """Generate ``tokens_of``, streamed or whole, with vLLM's shapes."""
    answer = answer_of(request, body)
    if not body.get("stream"):
        return web.json_response(answer)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for event in events_of(request, body):
        await response.write(event)
    await response.write_eof()
    return response


def answer_of(request: web.Request, body: Body) -> Body:
    chat = request.path.endswith("chat/completions")
    tokens = tokens_of(body)
    choice: Body = {"index": 0, "finish_reason": "length"}
    if chat:
        choice["message"] = {"role": "assistant", "content": "".join(tokens)}
    else:
        choice["text"] = "".join(tokens)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request.headers['X-Request-Id']}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1_700_000_000,
        "model": body.get("model"),
        "choices": [choice],
        "usage": {"prompt_tokens": 5, "completion_tokens": len(tokens), "total_tokens": 5 + len(tokens)},
        "kv_transfer_params": None,
    }


def events_of(request: web.Request, body: Body) -> list[bytes]:
    """The server-sent events of a streamed answer."""
    answer = answer_of(request, body)
    chat = answer["object"] == "chat.completion"
    head = {key: answer[key] for key in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"
    tokens = tokens_of(body)
    events = []
    for i, token in enumerate(tokens):
        reason = "length" if i == len(tokens) - 1 else None
        piece = {"delta": {"role": "assistant", "content": token}} if chat else {"text": token}
        events.append(head | {"choices": [{"index": 0, "finish_reason": reason, **piece}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(head | {"choices": [], "usage": answer["usage"]})
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


def status(code: int, message: str = "scripted", headers: dict[str, str] | None = None) -> Behaviour:
    """Answer ``code`` with an OpenAI error."""

    async def behave(server: EngineServer, request: web.Request, body: Body) -> web.StreamResponse:
        error = {"error": {"message": message, "type": "x", "param": None, "code": code}}
        return web.json_response(error, status=code, headers=headers)

    return behave


async def hang(server: EngineServer, request: web.Request, body: Body) -> web.StreamResponse:
    """Wait for ``release``, then do well."""
    await server.release.wait()
    return await server.well(server, request, body)


async def hang_up(server: EngineServer, request: web.Request, body: Body) -> web.StreamResponse:
    """Close the connection without an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def stream_then(count: int, end: Behaviour) -> Behaviour:
    """Stream ``count`` events, then do ``end``: hang, or hang up."""

    async def behave(server: EngineServer, request: web.Request, body: Body) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events_of(request, body)[:count]:
            await response.write(event)
        if end is hang:
            await server.release.wait()
            for event in events_of(request, body)[count:]:
                await response.write(event)
            return response
        await end(server, request, body)
        return response

    return behave


def answer_with(raw: bytes, content_type: str = "application/json") -> Behaviour:
    """Answer 200 with ``raw``."""

    async def behave(server: EngineServer, request: web.Request, body: Body) -> web.StreamResponse:
        return web.Response(body=raw, content_type=content_type)

    return behave


@contextmanager
def server_that_accepts_nothing() -> Iterator[str]:
    """The URL of a listener with a full queue: a connection attempt hangs."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        try:
            yield f"http://127.0.0.1:{full.getsockname()[1]}"
        finally:
            for filler in fillers:
                filler.close()


class Site:
    """Scripted servers and a running proxy."""

    def __init__(self, prefill: list[EngineServer], decode: list[EngineServer]) -> None:
        self.prefill = prefill
        self.decode = decode
        self.proxy: Proxy
        self.url = ""
        self.http: aiohttp.ClientSession

    def servers(self, role: str) -> list[Any]:
        return [s for s in self.proxy._servers if s.role == role]

    def metric(self, name: str, **labels: str) -> float:
        return self.proxy.metrics.registry.get_sample_value(f"penstock_proxy_{name}", labels) or 0.0

    async def complete(self, **fields: Any) -> aiohttp.ClientResponse:
        return await self.http.post(f"{self.url}/v1/completions", json=completion(**fields))

    @property
    def idle(self) -> bool:
        """No server has anything of any client, and the proxy counts nothing in flight."""
        busy = sum(s.active for s in self.prefill + self.decode)
        counted = sum(s.in_flight for s in self.proxy._servers)
        return busy == 0 and counted == 0 and self.proxy.drain.in_flight == 0


async def read_broken(response: aiohttp.ClientResponse) -> bytes:
    """What arrives of an answer that ends without the mark of its end; fail if the mark is there."""
    raw = b""
    try:
        while chunk := await response.content.readany():
            raw += chunk
    except aiohttp.ClientPayloadError:
        return raw
    raise AssertionError(f"the answer is marked as complete: {raw!r}")


def completion(**fields: Any) -> Body:
    return {"model": "m", "prompt": "hello", "max_tokens": 4, **fields}


@asynccontextmanager
async def running_site(
    prefill: int = 1, decode: int = 1, *, make: Callable[[str], EngineServer] = EngineServer, **config: Any
) -> AsyncIterator[Site]:
    """``prefill`` and ``decode`` scripted servers behind a proxy with fast probes; ``make(role)`` is one."""
    site = Site([make("prefill") for _ in range(prefill)], [make("decode") for _ in range(decode)])
    servers = site.prefill + site.decode
    for server in servers:
        await server.start()
    fast = {"backoff_base_s": 0.01, "backoff_max_s": 0.05, "connect_timeout_s": 2.0}
    settings = {**fast, "probe_timeout_s": PATIENCE_S, **config}
    app = make_app(
        ProxyConfig(
            prefill=tuple(s.url for s in site.prefill), decode=tuple(s.url for s in site.decode), **settings
        )
    )
    site.proxy = app[PROXY]
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    site.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    site.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    try:
        yield site
    finally:
        for server in servers:
            server.release.set()
        await site.http.close()
        await runner.cleanup()
        for server in servers:
            await server.stop()
