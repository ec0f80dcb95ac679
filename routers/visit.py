"""One client's request, from the first byte of its body to the last of its answer."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from aiohttp import web

from penstock.routers.bodies import Body, parse_body
from penstock.routers.config import ProxyConfig
from penstock.routers.drain import Drain
from penstock.routers.errors import ProxyError, error_response
from penstock.routers.exchange import Exchange, Handoff, Stage, no_server
from penstock.routers.fanout import FanOut
from penstock.routers.headers import REQUEST_ID, request_id_of, to_client, to_server
from penstock.routers.merge import part_id
from penstock.routers.metrics import Metrics
from penstock.routers.parts import Part
from penstock.routers.relay import Outcome, send

CLIENT_GONE = 499
"""Status in the metrics of a request whose client left; nobody receives it."""

STATUS_OF = {Outcome.BROKEN: 502, Outcome.CUT: 503, Outcome.CLIENT_GONE: CLIENT_GONE}
"""Status in the metrics of an answer that began well and ended too early."""


class Visit:
    """A request while the proxy works on it. ``handoff`` is None while no server has said what it is."""

    def __init__(
        self,
        request: web.Request,
        config: ProxyConfig,
        metrics: Metrics,
        drain: Drain,
        handoff: Handoff | None,
    ) -> None:
        self._request = request
        self._config = config
        self._metrics = metrics
        self._drain = drain
        self._handoff = handoff
        self._id = request_id_of(request.headers)
        self._started = time.perf_counter()
        self._mode = ""
        self._exchanges: list[Exchange] = []
        self._answering = False
        self._status = 0
        """Of the answer that is passed on."""
        self._outcome: Outcome | None = None
        """How the answer ended, once it has; what happens while the servers' connections close is no news."""

    @property
    def stage(self) -> Stage:
        """How far the request is; with several parts, how far the first of them is."""
        if self._answering:
            return Stage.STREAM
        return max((e.stage for e in self._exchanges), key=list(Stage).index, default=Stage.RECEIVE)

    async def run(self) -> web.StreamResponse:
        """Answer the request, whatever happens to it, and count how it ended."""
        task = asyncio.current_task()
        assert task is not None
        status = 500
        try:
            with self._drain.enter(task):
                response = await self._answer(task)
            status = response.status
            return response
        except ProxyError as error:
            status = error.status
            return self._refuse(error)
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            self._count(status)

    async def _answer(self, task: asyncio.Task[object]) -> web.StreamResponse:
        """Work on the request until its answer is out.

        Raises:
            ProxyError: nothing has been sent, and the proxy answers by itself.
        """
        try:
            body = parse_body(await self._receive())
            return await self._pass_on(body, task)
        except asyncio.CancelledError:
            if not self._drain.is_cut(task):
                raise
            task.uncancel()
            raise ProxyError(503, "the proxy shut down before the answer had begun") from None

    async def _receive(self) -> bytes:
        """The request's body."""
        kind = self._request.content_type
        if kind != "application/json":
            raise ProxyError(415, f"Content-Type must be application/json, not {kind}")
        limit = self._config.body_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await self._request.read()
        except TimeoutError:
            raise ProxyError(408, f"the body did not arrive within {limit} s") from None
        except web.HTTPRequestEntityTooLarge:
            raise ProxyError(413, f"the body is longer than {self._config.max_body_bytes} bytes") from None
        except web.RequestPayloadError as error:
            raise ProxyError(400, f"the body cannot be read: {error}") from None

    async def _pass_on(self, body: Body, task: asyncio.Task[object]) -> web.StreamResponse:
        handoff = self._handoff
        if handoff is None:
            raise no_server("prefill")
        path = self._request.path
        if path not in handoff.paths:
            raise ProxyError(404, f"the servers have no {path}")
        mode, parts = handoff.plan(path, body, self._config.max_choices)
        self._mode = mode.value

        def exchange(part: Part, request_id: str, leader: Exchange | None) -> Exchange:
            headers = to_server(self._request.headers, request_id)
            made = handoff.exchange(path, part.body, mode, headers, leader)
            self._exchanges.append(made)
            return made

        async with AsyncExitStack() as stack:
            if len(parts) > 1:
                fan = FanOut(
                    parts,
                    self._id,
                    self._config.split_concurrency,
                    lambda part, leader: exchange(part, part_id(self._id, part), leader),
                )
                answer = await (await stack.enter_async_context(fan)).answer()
            else:
                answer = (await exchange(parts[0], self._id, None).open(stack)).as_answer()
            self._status = answer.status
            response, self._outcome = await send(
                self._request,
                answer.status,
                to_client(answer.headers, self._id),
                answer.chunks,
                on_first=lambda: self._first_byte(is_stream=answer.is_stream),
                is_cut=lambda: self._drain.is_cut(task),
            )
        return response

    def _first_byte(self, *, is_stream: bool) -> None:
        self._answering = True
        if is_stream:
            self._metrics.ttft_seconds.observe(time.perf_counter() - self._started)

    def _refuse(self, error: ProxyError) -> web.Response:
        response = error_response(error)
        response.headers[REQUEST_ID] = self._id
        if self._drain.draining or not self._request.content.is_eof():
            response.force_close()
        return response

    def _count(self, status: int) -> None:
        metrics = self._metrics
        if self._outcome is not None:
            status = STATUS_OF.get(self._outcome, self._status)
        if status == CLIENT_GONE:
            metrics.disconnects.labels(self.stage.value).inc()
            for exchange in self._exchanges:
                exchange.leave()
        if self._outcome is Outcome.BROKEN:
            metrics.broken_streams.inc()
        metrics.requests.labels(self._request.path, self._mode, status).inc()
