"""One request to one server, with every way to fail told apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp
import msgspec
from multidict import CIMultiDict

from penstock.routers.config import ProxyConfig
from penstock.routers.errors import StreamBroken, UpstreamFailure
from penstock.routers.pool import Server

KEEPALIVE_S = 2.0
"""Idle connections close before the servers do it (uvicorn: 5 s), else a request meets a closing one."""

QUOTED = 300
"""Characters of a server's own error message that are passed on."""


@dataclass(slots=True)
class Answer:
    """What goes to the client: a status, headers, and a body that may still be under way."""

    status: int
    headers: CIMultiDict[str]
    is_stream: bool
    chunks: AsyncIterator[bytes]


@dataclass(slots=True)
class Reply:
    """A server's answer whose first bytes are here and whose rest may still be under way."""

    status: int
    headers: CIMultiDict[str]
    first: bytes
    rest: aiohttp.StreamReader | None
    """What follows ``first``; None where ``first`` is the whole body."""
    idle_timeout_s: float

    @property
    def ended(self) -> bool:
        """Whether the whole body has been read."""
        return self.rest is None or self.rest.at_eof()

    @property
    def is_stream(self) -> bool:
        """Whether the body is a stream of server-sent events."""
        return self.headers.get("Content-Type", "").startswith("text/event-stream")

    def as_answer(self) -> Answer:
        """This reply, to be passed on unchanged."""
        return Answer(self.status, self.headers, self.is_stream, self.chunks())

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, the first bytes included.

        Raises:
            StreamBroken: the server went away or fell silent before the end.
        """
        if self.first:
            yield self.first
        while self.rest is not None and (chunk := await self._next(self.rest)):
            yield chunk

    async def read(self) -> bytes:
        """The whole body. Raises like ``chunks``."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def _next(self, rest: aiohttp.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(self.idle_timeout_s):
                return await rest.readany()
        except TimeoutError:
            raise StreamBroken(f"the server sent nothing for {self.idle_timeout_s} s") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise StreamBroken(f"the server broke off ({type(error).__name__})") from error


class Upstream:
    """HTTP client for the servers of both roles."""

    def __init__(self, session: aiohttp.ClientSession, config: ProxyConfig) -> None:
        self._session = session
        self._config = config

    async def ask(self, server: Server, path: str, body: bytes, headers: CIMultiDict[str]) -> Reply:
        """POST and read the whole answer, whose body is then ``Reply.first``. The prefill step.

        Raises:
            UpstreamFailure: no answer, a broken one, or a status of 500 and above.
        """
        return await self._whole(server, "POST", path, body, headers)

    async def get(self, server: Server, path: str, headers: CIMultiDict[str]) -> Reply:
        """GET and read the whole answer. Raises like ``ask``."""
        return await self._whole(server, "GET", path, None, headers)

    async def _whole(
        self, server: Server, method: str, path: str, body: bytes | None, headers: CIMultiDict[str]
    ) -> Reply:
        limit = self._config.prefill_timeout_s
        with failures_of(server, limit), ends_on_switch(server):
            async with (
                asyncio.timeout(limit),
                self._session.request(
                    method, server.url + path, data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                raw = await response.read()
        check_status(server, response, raw)
        return Reply(response.status, response.headers.copy(), raw, None, limit)

    @asynccontextmanager
    async def open(
        self,
        server: Server,
        path: str,
        body: bytes,
        headers: CIMultiDict[str],
        on_sent: Callable[[], None] | None = None,
    ) -> AsyncIterator[Reply]:
        """POST and wait for the first bytes; leaving the context early closes the connection.

        ``on_sent`` is called when the request's headers have left: from then on the server may know of it.

        Raises:
            UpstreamFailure: on entry, as for ``ask``.
        """
        limit = self._config.first_byte_timeout_s
        async with AsyncExitStack() as stack:
            with failures_of(server, limit), ends_on_switch(server):
                async with asyncio.timeout(limit):
                    response = await self._session.post(
                        server.url + path,
                        data=body,
                        headers=headers,
                        allow_redirects=False,
                        trace_request_ctx=on_sent,
                    )
                    stack.callback(response.close)
                    if response.status >= 500:
                        check_status(server, response, await response.read())
                    first = await response.content.readany()
            yield Reply(
                response.status, response.headers.copy(), first, response.content, self._config.idle_timeout_s
            )


def open_session(config: ProxyConfig) -> aiohttp.ClientSession:
    """The client session for all servers: bytes pass as they are, no limit on connections, own timeouts."""
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_tell_sent)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout_s),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trace_configs=[trace],
    )


async def _tell_sent(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx()


@contextmanager
def failures_of(server: Server, limit_s: float) -> Iterator[None]:
    """Turn what aiohttp raises into ``UpstreamFailure``, and note in ``server`` what it says about it."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        server.mark_down(f"no connection ({type(error).__name__})")
        raise UpstreamFailure(server, "connect", f"no connection to a {server.role} server") from error
    except TimeoutError as error:
        server.suspect()
        raise UpstreamFailure(
            server, "timeout", f"a {server.role} server gave no answer within {limit_s} s"
        ) from error
    except (aiohttp.ClientError, ConnectionError) as error:
        server.suspect()
        raise UpstreamFailure(
            server, "disconnect", f"a {server.role} server broke off before its answer was complete"
        ) from error


@contextmanager
def ends_on_switch(server: Server) -> Iterator[None]:
    """End what waits here for an answer of a server that takes another role, which no longer knows of it.

    Raises:
        UpstreamFailure: it did. Like ``asyncio.timeout``, it cancels the task that entered.
    """
    role, task, switched = server.role, asyncio.current_task(), False
    assert task is not None
    others = task.cancelling()

    def give_up() -> None:
        nonlocal switched
        switched = True
        task.cancel()

    with server.told_of_switch(give_up):
        try:
            yield
        except asyncio.CancelledError:
            if not switched or task.uncancel() > others:
                raise
            detail = f"a {role} server took another role before it had answered"
            raise UpstreamFailure(server, "switched", detail) from None


def check_status(server: Server, response: aiohttp.ClientResponse, raw: bytes) -> None:
    """Raise ``UpstreamFailure`` for a status of 500 and above, with the server's own message in it."""
    if response.status < 500:
        return
    said = quoted_message(raw)
    detail = f"a {server.role} server answered {response.status}" + (f": {said}" if said else "")
    after = response.headers.get("Retry-After", "")
    raise UpstreamFailure(server, "status", detail, status=response.status, retry_after=after)


class _ErrorObject(msgspec.Struct):
    message: str


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorObject | None = None
    message: str = ""
    """SGLang's OpenAI routes have the error's fields at the top."""


def quoted_message(raw: bytes) -> str:
    """The message of a server's error body, cut to ``QUOTED`` characters; empty for anything else."""
    try:
        answer = msgspec.json.decode(raw, type=_ErrorAnswer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return (answer.message if answer.error is None else answer.error.message)[:QUOTED]
