"""What the hand-off protocols have in common: an exchange takes one request through the servers."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from multidict import CIMultiDict

from penstock.routers.bodies import Body, Mode
from penstock.routers.errors import ProxyError, UpstreamFailure
from penstock.routers.metrics import Metrics
from penstock.routers.parts import Part
from penstock.routers.pool import Pool, Role, Server
from penstock.routers.upstream import Reply, Upstream

COMPLETIONS_PATH = "/v1/completions"
CHAT_PATH = "/v1/chat/completions"


class Stage(StrEnum):
    """How far a request has come; names what a leaving client interrupts."""

    RECEIVE = "receive"
    """Its body is not complete."""
    PREFILL = "prefill"
    """A prefill server works on it."""
    HANDOFF = "handoff"
    """The prefill server holds blocks for it and no decode server has heard of it."""
    DECODE = "decode"
    """A decode server has it, no prefill server works on it, and nothing has been sent."""
    STREAM = "stream"
    """Its answer is under way."""


@dataclass(slots=True)
class Fleet:
    """Everything that an exchange needs beside the request."""

    prefill: Pool
    decode: Pool
    upstream: Upstream
    metrics: Metrics
    ask_roles: Callable[[], Awaitable[None]]
    """Notice which servers have another role than before."""

    def pool(self, role: Role) -> Pool:
        """The servers of ``role``."""
        return self.prefill if role == "prefill" else self.decode


class Exchange(ABC):
    """One body's way through the servers. ``stage`` tells how far it is.

    A ``leader`` is an exchange with the same prompt: this one prefills after it and at the same server, where
    the prompt is cached by then.
    """

    stage: Stage

    def __init__(
        self, fleet: Fleet, path: str, body: Body, headers: CIMultiDict[str], leader: Exchange | None
    ) -> None:
        self._fleet = fleet
        self._path = path
        self._body = body
        self._headers = headers
        self._leader = leader
        self.prefilled = asyncio.Event()
        self.prefilled_at: Server | None = None

    @abstractmethod
    async def open(self, stack: AsyncExitStack) -> Reply:
        """Bring the request to the first bytes of its answer; closing ``stack`` ends it at every server.

        A client error (status 4xx) of any server is an answer like every other.

        Raises:
            ProxyError: 502, 503 or 504.
        """

    def leave(self) -> None:  # noqa: B027 - closing the connections is all that most protocols need
        """The client is gone, and the connections to the servers are closed."""

    async def _near_leader(self) -> Server | None:
        """Wait until the leader has prefilled; where that was."""
        if self._leader is None:
            return None
        await self._leader.prefilled.wait()
        return self._leader.prefilled_at

    def _place(self, role: Role, near: Server | None = None) -> Server:
        """``near`` or any server of ``role``.

        Raises:
            ProxyError: 503, all of them are put aside.
        """
        near_enough = near is not None and near.healthy and near.role == role
        server = near if near_enough else self._fleet.pool(role).pick()
        if server is None:
            raise no_server(role)
        return server

    async def _attempt(
        self, server: Server, body: bytes, stack: AsyncExitStack, on_sent: Callable[[], None] | None = None
    ) -> Reply:
        """Open an answer at ``server``; only one that succeeds stays on ``stack``."""
        async with AsyncExitStack() as attempt:
            attempt.enter_context(self._fleet.pool(server.role).occupy(server))
            started = time.perf_counter()
            reply = await attempt.enter_async_context(
                self._fleet.upstream.open(server, self._path, body, self._headers, on_sent)
            )
            if server.role == "decode":
                seconds = self._fleet.metrics.decode_seconds
                attempt.callback(lambda: seconds.observe(time.perf_counter() - started))
            stack.push_async_exit(attempt.pop_all())
            return reply

    async def _ask_prefill(self, server: Server, body: bytes) -> Reply:
        """The whole answer of a prefill server; one of status 200 is what ``prefilled_at`` and metrics tell.

        Raises:
            UpstreamFailure: it gave none.
        """
        started = time.perf_counter()
        with self._fleet.prefill.occupy(server):
            reply = await self._fleet.upstream.ask(server, self._path, body, self._headers)
        if reply.status == 200:
            self._fleet.metrics.prefill_seconds.observe(time.perf_counter() - started)
            self.prefilled_at = server
        return reply


class Handoff(ABC):
    """How a prompt's KV cache gets to a decode server: what the servers of one engine want to be told."""

    paths: ClassVar[frozenset[str]]
    """Routes that ask for an answer."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @abstractmethod
    def plan(self, path: str, body: Body, limit: int) -> tuple[Mode, list[Part]]:
        """Where a client's ``body`` runs, and the requests to make of it; with one part that is ``body``.

        Raises:
            ProxyError: 400 for what the servers must not see, and for more than ``limit`` answers.
        """

    @abstractmethod
    def exchange(
        self, path: str, body: Body, mode: Mode, headers: CIMultiDict[str], leader: Exchange | None
    ) -> Exchange:
        """The exchange of one part."""

    @abstractmethod
    async def finish(self) -> None:
        """End what is still under way behind requests that are over."""


async def fetch(fleet: Fleet, path: str, headers: CIMultiDict[str]) -> Reply:
    """GET ``path`` from a decode server; the answer's body is ``Reply.first``.

    Raises:
        ProxyError: 502, 503 or 504.
    """
    server = fleet.decode.pick()
    if server is None:
        raise no_server("decode")
    try:
        return await fleet.upstream.get(server, path, headers)
    except UpstreamFailure as failure:
        raise failure.as_proxy_error() from failure


def no_server(role: Role) -> ProxyError:
    """503: every server of ``role`` is put aside."""
    return ProxyError(503, f"no healthy {role} server", retry_after_s=1)
