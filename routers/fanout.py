"""A request for several answers: its parts run side by side and come back as one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from multidict import CIMultiDict

from penstock.routers.errors import ProxyError, StreamBroken
from penstock.routers.exchange import Exchange
from penstock.routers.merge import DONE, Merger, events_of
from penstock.routers.parts import Part
from penstock.routers.upstream import Answer, Reply

QUEUE = 64
"""Events that wait for the client before the parts are held back."""


@dataclass(slots=True)
class Opened:
    """A part's answer has begun."""

    headers: CIMultiDict[str]
    is_stream: bool


@dataclass(slots=True)
class Refused:
    """A server refused a part (4xx)."""

    reply: Reply
    raw: bytes


@dataclass(slots=True)
class Failed:
    """A part came to a bad end."""

    error: ProxyError | StreamBroken


@dataclass(slots=True)
class Event:
    """One server-sent event of a part."""

    part: Part
    data: bytes


@dataclass(slots=True)
class Ended:
    """A part is complete; ``raw`` is its whole answer where it was no stream."""

    part: Part
    raw: bytes


News = Opened | Refused | Failed | Event | Ended


class FanOut:
    """Runs the parts while the context is open; leaving it ends what is left of them at every server."""

    def __init__(
        self,
        parts: Sequence[Part],
        request_id: str,
        concurrency: int,
        make_exchange: Callable[[Part, Exchange | None], Exchange],
    ) -> None:
        self._parts = parts
        self._make_exchange = make_exchange
        self._merger = Merger(request_id)
        self._slots = asyncio.Semaphore(concurrency)
        self._news: asyncio.Queue[News] = asyncio.Queue(QUEUE)
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        leader: Exchange | None = None
        for part in self._parts:
            exchange = self._make_exchange(part, leader if part.choice else None)
            if part.choice == 0:
                leader = exchange
            self._tasks.append(self._group.create_task(self._run(part, exchange)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        if isinstance(error, asyncio.CancelledError):
            await self._group.__aexit__(kind, error, trace)
        else:
            await self._group.__aexit__(None, None, None)

    async def answer(self) -> Answer:
        """Wait until the first part's answer has begun, or all are complete where they are no streams.

        Raises:
            ProxyError: a part failed.
        """
        news = await self._news.get()
        if isinstance(news, Opened) and news.is_stream:
            return Answer(200, _plain(news.headers), True, self._stream())
        answers: list[tuple[Part, bytes]] = []
        headers: CIMultiDict[str] = CIMultiDict()
        while True:
            match news:
                case Opened():
                    headers = _plain(news.headers)
                case Ended():
                    answers.append((news.part, news.raw))
                case Refused():
                    return Answer(news.reply.status, news.reply.headers, False, _once(news.raw))
                case Failed():
                    raise (
                        news.error if isinstance(news.error, ProxyError) else ProxyError(502, str(news.error))
                    )
                case Event():
                    raise ProxyError(502, "a decode server mixed streamed and whole answers")
            if len(answers) == len(self._parts):
                return Answer(200, headers, False, _once(self._whole(answers)))
            news = await self._news.get()

    def _whole(self, answers: list[tuple[Part, bytes]]) -> bytes:
        try:
            return self._merger.whole(answers)
        except ValueError as error:
            raise ProxyError(502, f"a decode server's answer cannot be used: {error}") from None

    async def _stream(self) -> AsyncIterator[bytes]:
        ended = 0
        while ended < len(self._parts):
            news = await self._news.get()
            match news:
                case Refused():
                    raise StreamBroken(f"a server refused a part of it with {news.reply.status}")
                case Failed():
                    raise StreamBroken(str(news.error))
                case Ended():
                    ended += 1
                case Event():
                    event = self._merged(news)
                    if event is not None:
                        yield event
        yield self._merger.stream_end()

    def _merged(self, news: Event) -> bytes | None:
        try:
            return self._merger.event(news.part, news.data)
        except ValueError as error:
            raise StreamBroken(f"an event of a decode server cannot be used: {error}") from None

    async def _run(self, part: Part, exchange: Exchange) -> None:
        """Bring one part through and report what happens to it."""
        async with self._slots, AsyncExitStack() as stack:
            try:
                reply = await exchange.open(stack)
                if reply.status != 200:
                    await self._news.put(Refused(reply, await reply.read()))
                    return
                await self._news.put(Opened(reply.headers, reply.is_stream))
                if not reply.is_stream:
                    await self._news.put(Ended(part, await reply.read()))
                    return
                async for data in events_of(reply.chunks()):
                    if data != DONE:
                        await self._news.put(Event(part, data))
                await self._news.put(Ended(part, b""))
            except (ProxyError, StreamBroken) as error:
                await self._news.put(Failed(error))


async def _once(raw: bytes) -> AsyncIterator[bytes]:
    yield raw


def _plain(headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """Headers of a part that hold for the whole as well."""
    return CIMultiDict({"Content-Type": headers.get("Content-Type", "application/json")})
