"""vLLM's hand-off: prefill first, then decode with what the prefill server's answer says.

Every server can serve a whole request, so one that a moved KV cache does not help runs on a single server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeVar

from multidict import CIMultiDict

from penstock.routers.bodies import Body, Mode, encode_body, refuse
from penstock.routers.errors import ProxyError, UpstreamFailure
from penstock.routers.exchange import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    Exchange,
    Fleet,
    Handoff,
    Stage,
    no_server,
)
from penstock.routers.parts import Part, split
from penstock.routers.pool import Role, Server
from penstock.routers.returns import Returns
from penstock.routers.upstream import Reply
from penstock.routers.vllm_bodies import RESERVED, decode_body, handed_over, mode_of, prefill_body

T = TypeVar("T")


class SequentialHandoff(Handoff):
    """Parameters of the prefill server's answer go into the decode server's request."""

    paths = frozenset({COMPLETIONS_PATH, CHAT_PATH})

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self._returns = Returns(fleet.decode, fleet.upstream, fleet.metrics)

    def plan(self, path: str, body: Body, limit: int) -> tuple[Mode, list[Part]]:
        """A part for each answer, where the KV cache is to move; else the whole."""
        refuse(body, RESERVED)
        mode = mode_of(body)
        parts = split(body, limit, chat=path == CHAT_PATH)
        return mode, parts if mode is Mode.HANDOFF else [Part(0, 0, 0, body)]

    def exchange(
        self, path: str, body: Body, mode: Mode, headers: CIMultiDict[str], leader: Exchange | None
    ) -> Exchange:
        """The exchange of one part."""
        return SequentialExchange(self._fleet, self._returns, path, body, mode, headers, leader)

    async def finish(self) -> None:
        """Wait for hand-offs that are on their way back."""
        await self._returns.finish()


class SequentialExchange(Exchange):
    """Prefill, hand-off, decode, with at most one second try a role."""

    def __init__(
        self,
        fleet: Fleet,
        returns: Returns,
        path: str,
        body: Body,
        mode: Mode,
        headers: CIMultiDict[str],
        leader: Exchange | None,
    ) -> None:
        super().__init__(fleet, path, body, headers, leader)
        self._returns = returns
        self._mode = mode
        self._params: Body | None = None
        self.stage = Stage.PREFILL if mode is Mode.HANDOFF else Stage.DECODE

    def leave(self) -> None:
        """The client is gone: give back what no decode server has heard of."""
        if self.stage is Stage.HANDOFF:
            self._give_back("client_gone")

    async def open(self, stack: AsyncExitStack) -> Reply:
        """As ``Exchange.open``."""
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
        body = encode_body(prefill_body(self._body, chat=self._path == CHAT_PATH))

        async def ask(server: Server) -> tuple[Reply | None, Body | None]:
            reply = await self._ask_prefill(server, body)
            if reply.status != 200:
                return reply, None
            try:
                return None, handed_over(reply.first)
            except ValueError as error:
                detail = f"a prefill server cannot be used: {error}"
                raise UpstreamFailure(server, "garbage", detail) from None

        near = await self._near_leader()
        try:
            refusal, params = await self._twice("prefill", ask, near)
        except UpstreamFailure as failure:
            raise failure.as_proxy_error() from failure
        if refusal is None:
            self._params = params
            self.stage = Stage.HANDOFF if params is not None else Stage.DECODE
            if params is None:
                self._fleet.metrics.without_handoff.inc()
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
            body = encode_body(decode_body(self._body, self._params))
            return await self._attempt(server, body, stack, self._sent)

        try:
            return await self._twice("decode", answer)
        except (UpstreamFailure, ProxyError) as failure:
            if self.stage is Stage.HANDOFF:
                self._give_back("decode_unreachable")
            if isinstance(failure, ProxyError):
                raise
            raise failure.as_proxy_error() from failure

    def _sent(self) -> None:
        self.stage = Stage.DECODE

    def _give_back(self, reason: str) -> None:
        params, self._params = self._params, None
        if params is not None:
            self._returns.give_back(params, self._headers, reason)

    async def _open_at(self, role: Role, body: bytes, stack: AsyncExitStack) -> Reply:
        """Run the whole request at one server of ``role``."""
        try:
            return await self._twice(role, lambda server: self._attempt(server, body, stack))
        except UpstreamFailure as failure:
            raise failure.as_proxy_error() from failure

    async def _twice(
        self, role: Role, call: Callable[[Server], Awaitable[T]], near: Server | None = None
    ) -> T:
        """``call`` with ``near`` or any server of ``role``, once more with another one where that fails."""
        server = self._place(role, near)
        try:
            return await call(server)
        except UpstreamFailure as failure:
            other = self._fleet.pool(role).pick(exclude=[server])
            if not failure.retryable or other is None:
                raise
        self._fleet.metrics.retries.labels(role).inc()
        return await call(other)
