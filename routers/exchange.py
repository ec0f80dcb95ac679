"""One request on its way: prefill, hand-off, decode, with at most one second try a role."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from multidict import CIMultiDict

from penstock.routers.bodies import Body, Mode, decode_body, encode_body, handed_over, prefill_body
from penstock.routers.errors import ProxyError, UpstreamFailure
from penstock.routers.metrics import Metrics
from penstock.routers.pool import Pool, Role, Server
from penstock.routers.returns import Returns
from penstock.routers.upstream import Reply, Upstream

T = TypeVar("T")

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
    """A decode server has it and has sent nothing."""
    STREAM = "stream"
    """Its answer is under way."""


@dataclass(slots=True)
class Fleet:
    """Everything that an exchange needs beside the request."""

    prefill: Pool
    decode: Pool
    upstream: Upstream
    metrics: Metrics
    returns: Returns

    def pool(self, role: Role) -> Pool:
        """The servers of ``role``."""
        return self.prefill if role == "prefill" else self.decode

    @property
    def servers(self) -> list[Server]:
        """The servers of both roles."""
        return self.prefill.servers + self.decode.servers


class Exchange:
    """One body's way through the servers. ``stage`` tells how far it is.

    A ``leader`` is an exchange with the same prompt: this one prefills after it and at the same server, where
    the prompt is cached by then.
    """

    def __init__(
        self,
        fleet: Fleet,
        path: str,
        body: Body,
        mode: Mode,
        headers: CIMultiDict[str],
        leader: Exchange | None = None,
    ) -> None:
        self._fleet = fleet
        self._path = path
        self._body = body
        self._mode = mode
        self._headers = headers
        self._leader = leader
        self.prefilled = asyncio.Event()
        self.prefilled_at: Server | None = None
        self._params: Body | None = None
        self.stage = Stage.PREFILL if mode is Mode.HANDOFF else Stage.DECODE

    def leave(self) -> None:
        """The client is gone: give back what no decode server has heard of."""
        if self.stage is Stage.HANDOFF:
            self._give_back("client_gone")

    async def open(self, stack: AsyncExitStack) -> Reply:
        """Bring the request to the first bytes of its answer; closing ``stack`` ends it at every server.

        A client error (status 4xx) of any server is an answer like every other.

        Raises:
            ProxyError: 502, 503 or 504.
        """
        if self._mode is Mode.PREFILL_ONLY:
            return await self._open_at("prefill", encode_body(self._body), stack)
        if self._mode is Mode.DECODE_ONLY:
            return await self._open_at("decode", encode_body(self._body), stack)
        if not self._fleet.decode.any_healthy:
            raise no_server("decode")
        refusal = await self._prefill()
        return refusal if refusal is not None else await self._decode(stack)

    async def _prefill(self) -> Reply | None:
        """The prefill step: a refusal (4xx) to pass on, or None and the hand-off's parameters are here."""
        metrics = self._fleet.metrics
        body = encode_body(prefill_body(self._body, chat=self._path == CHAT_PATH))

        async def ask(server: Server) -> tuple[Reply | None, Body | None]:
            started = time.perf_counter()
            with self._fleet.prefill.occupy(server):
                reply = await self._fleet.upstream.ask(server, self._path, body, self._headers)
            if reply.status != 200:
                return reply, None
            metrics.prefill_seconds.observe(time.perf_counter() - started)
            self.prefilled_at = server
            try:
                return None, handed_over(reply.first)
            except ValueError as error:
                raise UpstreamFailure("garbage", f"a prefill server cannot be used: {error}") from None

        if self._leader is not None:
            await self._leader.prefilled.wait()
        near = None if self._leader is None else self._leader.prefilled_at
        try:
            refusal, params = await self._twice("prefill", ask, near)
        except UpstreamFailure as failure:
            raise failure.as_proxy_error() from failure
        if refusal is None:
            self._params = params
            self.stage = Stage.HANDOFF if params is not None else Stage.DECODE
            if params is None:
                metrics.without_handoff.inc()
        self.prefilled.set()
        return refusal

    async def _decode(self, stack: AsyncExitStack) -> Reply:
        """The decode step. A second try uses the hand-off if no server has heard of it, else a new one."""

        async def answer(server: Server) -> Reply:
            if self._params is not None and self.stage is not Stage.HANDOFF:
                # The server that failed may have used it up, or may have died with the blocks still held.
                self._give_back("decode_failed")
                self.stage = Stage.PREFILL
                if (refusal := await self._prefill()) is not None:
                    return refusal
            return await self._attempt(server, encode_body(decode_body(self._body, self._params)), stack)

        try:
            return await self._twice("decode", answer)
        except (UpstreamFailure, ProxyError) as failure:
            if self.stage is Stage.HANDOFF:
                self._give_back("decode_unreachable")
            if isinstance(failure, ProxyError):
                raise
            raise failure.as_proxy_error() from failure

    def _give_back(self, reason: str) -> None:
        params, self._params = self._params, None
        if params is not None:
            self._fleet.returns.give_back(params, self._headers, reason)

    async def _open_at(self, role: Role, body: bytes, stack: AsyncExitStack) -> Reply:
        """Run the whole request at one server of ``role``."""
        try:
            return await self._twice(role, lambda server: self._attempt(server, body, stack))
        except UpstreamFailure as failure:
            raise failure.as_proxy_error() from failure

    async def _attempt(self, server: Server, body: bytes, stack: AsyncExitStack) -> Reply:
        """Open an answer at ``server``; only one that succeeds stays on ``stack``."""
        async with AsyncExitStack() as attempt:
            attempt.enter_context(self._fleet.pool(server.role).occupy(server))
            started = time.perf_counter()
            reply = await attempt.enter_async_context(
                self._fleet.upstream.open(server, self._path, body, self._headers, self._sent)
            )
            if server.role == "decode":
                seconds = self._fleet.metrics.decode_seconds
                attempt.callback(lambda: seconds.observe(time.perf_counter() - started))
            stack.push_async_exit(attempt.pop_all())
            return reply

    def _sent(self) -> None:
        self.stage = Stage.DECODE

    async def _twice(
        self, role: Role, call: Callable[[Server], Awaitable[T]], near: Server | None = None
    ) -> T:
        """``call`` with ``near`` or any server of ``role``, once more with another one where that fails."""
        pool = self._fleet.pool(role)
        server = near if near is not None and near.healthy else pool.pick()
        if server is None:
            raise no_server(role)
        try:
            return await call(server)
        except UpstreamFailure as failure:
            other = pool.pick(exclude=[server])
            if not failure.retryable or other is None:
                raise
        self._fleet.metrics.retries.labels(role).inc()
        return await call(other)


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
