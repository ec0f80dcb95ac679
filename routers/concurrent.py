"""SGLang's hand-off: both servers get a request at once, with the room in which they meet.

No server can serve a request alone. The prefill server's answer says only that the decode server has read its
KV cache, or why not; and a server that waits for one that failed waits for minutes. So the failure of either,
before the first byte of the answer, ends the request at both, and a second try has a room of its own.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass

from multidict import CIMultiDict

from penstock.routers import input_logprobs
from penstock.routers.bodies import Body, Mode, choices_per_prompt, encode_body, refuse
from penstock.routers.errors import StreamBroken, UpstreamFailure
from penstock.routers.exchange import CHAT_PATH, COMPLETIONS_PATH, Exchange, Fleet, Handoff, Stage
from penstock.routers.parts import Part, split
from penstock.routers.pool import Server
from penstock.routers.sglang_bodies import (
    PER_PROMPT,
    RESERVED,
    failure_in,
    meeting,
    new_room,
    prefill_body,
    refuse_parallel_samples,
)
from penstock.routers.upstream import QUOTED, Reply

GENERATE_PATH = "/generate"

PATIENCE_S = 10.0
"""For a prefill server whose request is answered, to say that it is done."""

log = logging.getLogger("penstock.proxy")


class ConcurrentHandoff(Handoff):
    """A room for each prompt; several answers to one prompt are requests of their own."""

    paths = frozenset({COMPLETIONS_PATH, CHAT_PATH, GENERATE_PATH})

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self._late: set[asyncio.Task[None]] = set()

    def plan(self, path: str, body: Body, limit: int) -> tuple[Mode, list[Part]]:
        """A part for each answer where a prompt has several; else the whole."""
        refuse(body, RESERVED)
        whole = [Part(0, 0, 0, body)]
        if path == GENERATE_PATH:
            refuse_parallel_samples(body)
            return Mode.HANDOFF, whole
        parts = split(body, limit, chat=path == CHAT_PATH, per_prompt=PER_PROMPT)
        if choices_per_prompt(body, limit) == 1:
            return Mode.HANDOFF, whole
        for part in parts:
            part.body.pop("rid", None)
        return Mode.HANDOFF, parts

    def exchange(
        self, path: str, body: Body, mode: Mode, headers: CIMultiDict[str], leader: Exchange | None
    ) -> Exchange:
        """The exchange of one part."""
        return ConcurrentExchange(self._fleet, self, path, body, headers, leader)

    async def part_with(self, prefill: asyncio.Task[Reply], decode: Reply | None) -> None:
        """A request is over: its prefill may have a last word where the decode server's answer is complete.

        It says so a step of the scheduler later, and to close its connection would count as an abort.
        """
        if decode is None or not decode.ended:
            await ended(prefill)
        else:
            hearing = asyncio.create_task(hear_out(prefill))
            self._late.add(hearing)
            hearing.add_done_callback(self._late.discard)

    async def finish(self) -> None:
        """No prefill server is listened to any longer."""
        for hearing in list(self._late):
            await ended(hearing)


@dataclass(frozen=True, slots=True)
class Couple:
    """The two servers of a try."""

    prefill: Server
    decode: Server

    @property
    def stands(self) -> bool:
        """Whether both still have the roles in which they were asked."""
        return self.prefill.role == "prefill" and self.decode.role == "decode"


class ConcurrentExchange(Exchange):
    """Both servers at once, with at most one second try at another couple."""

    def __init__(
        self,
        fleet: Fleet,
        handoff: ConcurrentHandoff,
        path: str,
        body: Body,
        headers: CIMultiDict[str],
        leader: Exchange | None,
    ) -> None:
        super().__init__(fleet, path, body, headers, leader)
        self._handoff = handoff
        self._with_input_logprobs = input_logprobs.wanted(path, body)
        self.stage = Stage.PREFILL

    async def open(self, stack: AsyncExitStack) -> Reply:
        """As ``Exchange.open``."""
        near = await self._near_leader()
        couple = await self._couple(near)
        try:
            return await self._together(couple, self._body, stack)
        except UpstreamFailure as failure:
            role = "prefill" if failure.server is couple.prefill else "decode"
            other = await self._other_than(couple, failure)
            if other is None:
                raise failure.as_proxy_error() from failure
            self._fleet.metrics.retries.labels(role).inc()
        # A server may not know yet that the first try is over, and takes an id once.
        body = {key: value for key, value in self._body.items() if key != "rid"}
        self.stage = Stage.PREFILL
        try:
            return await self._together(other, body, stack)
        except UpstreamFailure as failure:
            raise failure.as_proxy_error() from failure

    async def _couple(self, near: Server | None = None) -> Couple:
        """Two servers for a try.

        Raises:
            ProxyError: 503, there is none of a role.
        """
        if not (self._fleet.prefill.any_healthy and self._fleet.decode.any_healthy):
            await self._fleet.ask_roles()
        return Couple(self._place("prefill", near), self._place("decode"))

    async def _other_than(self, couple: Couple, failure: UpstreamFailure) -> Couple | None:
        """Where to try again: not at the server that failed, nor at its partner if that can be. Where one of
        them has another role now, that is all that was wrong with them.

        Raises:
            ProxyError: 503, there is none of a role any more.
        """
        if not failure.retryable:
            return None
        await self._fleet.ask_roles()
        if not couple.stands:
            return await self._couple()
        other = Couple(
            self._fleet.prefill.pick(exclude=[couple.prefill]) or couple.prefill,
            self._fleet.decode.pick(exclude=[couple.decode]) or couple.decode,
        )
        if failure.kind == "status":
            # A transfer failed: the server that says so need not be the one that is ill.
            return other if other != couple else None
        replaced = other.prefill if failure.server is couple.prefill else other.decode
        return other if replaced is not failure.server else None

    async def _together(self, couple: Couple, body: Body, stack: AsyncExitStack) -> Reply:
        """One try: the decode server's answer, or a refusal (4xx) of either.

        Raises:
            UpstreamFailure: of either, before the first byte.
        """
        at_decode = meeting(body, couple.prefill, new_room())
        reply: Reply | None = None
        async with AsyncExitStack() as attempt:
            prefill = asyncio.create_task(self._prefill(couple.prefill, encode_body(prefill_body(at_decode))))
            attempt.push_async_callback(lambda: self._handoff.part_with(prefill, reply))
            decode = asyncio.create_task(self._attempt(couple.decode, encode_body(at_decode), attempt))
            attempt.push_async_callback(ended, decode)
            await asyncio.wait((prefill, decode), return_when=asyncio.FIRST_COMPLETED)
            if not decode.done():
                if (said := prefill.result()).status != 200:
                    return said
                await asyncio.wait((decode,))
            reply = answer = checked(couple.decode, decode.result())
            if answer.status != 200:
                await ended(prefill)
            elif self._with_input_logprobs:
                said = await prefill
                if said.status != 200:
                    return said
                answer = await self._graft(couple.decode, reply, said)
            stack.push_async_exit(attempt.pop_all())
            return answer

    async def _prefill(self, server: Server, body: bytes) -> Reply:
        reply = await self._ask_prefill(server, body)
        if reply.status == 200 and self.stage is Stage.PREFILL:
            self.stage = Stage.DECODE
        self.prefilled.set()
        return reply

    async def _graft(self, decode: Server, reply: Reply, said: Reply) -> Reply:
        try:
            return await input_logprobs.graft(reply, said.first)
        except ValueError as error:
            detail = f"the prompt's log probabilities cannot be added to an answer: {error}"
            raise UpstreamFailure(decode, "garbage", detail) from None
        except StreamBroken as error:
            raise UpstreamFailure(decode, "disconnect", f"a decode server: {error}") from error


def checked(server: Server, reply: Reply) -> Reply:
    """``reply``, unless it is a stream that begins with the failure of its request.

    Raises:
        UpstreamFailure: it is one.
    """
    if reply.status == 200 and reply.is_stream and (failed := failure_in(reply.first)) is not None:
        status, message = failed
        detail = f"a {server.role} server answered {status}: {message[:QUOTED]}"
        raise UpstreamFailure(server, "status", detail, status=status)
    return reply


async def hear_out(prefill: asyncio.Task[Reply]) -> None:
    """Wait for the end of a prefill whose request is answered; it changes nothing any more."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await prefill
    except UpstreamFailure as failure:
        log.info("after its request was answered, %s", failure)
    except TimeoutError:
        log.info("a prefill server was not done %s s after its request was answered", PATIENCE_S)


async def ended(task: asyncio.Task[Reply] | asyncio.Task[None]) -> None:
    """Cancel ``task`` and wait until it has closed its connection; what came of it does not matter."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
