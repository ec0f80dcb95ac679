"""The aiohttp application: its routes and what is around a request's work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from penstock.routers.concurrent import GENERATE_PATH, ConcurrentHandoff
from penstock.routers.config import Engine, ProxyConfig
from penstock.routers.discovery import Deployment
from penstock.routers.drain import RETRY_AFTER_S, Drain
from penstock.routers.errors import ProxyError, error_response
from penstock.routers.exchange import CHAT_PATH, COMPLETIONS_PATH, Fleet, Handoff, fetch
from penstock.routers.headers import request_id_of, to_client, to_server
from penstock.routers.metrics import Metrics
from penstock.routers.pool import Pool, Server
from penstock.routers.prober import Roles, probe_all, watch
from penstock.routers.sequential import SequentialHandoff
from penstock.routers.upstream import Upstream, open_session
from penstock.routers.visit import CLIENT_GONE, Visit

MODELS_PATH = "/v1/models"
HANDOFFS: dict[Engine, type[Handoff]] = {"vllm": SequentialHandoff, "sglang": ConcurrentHandoff}


class Proxy:
    """The handlers and what they share."""

    def __init__(self, config: ProxyConfig) -> None:
        self.config = config
        self.drain = Drain()
        self._servers = [Server("prefill", url) for url in config.prefill]
        self._servers += [Server("decode", url) for url in config.decode]
        self._prefill = Pool("prefill", self._servers)
        self._decode = Pool("decode", self._servers)
        self.metrics = Metrics(self._servers)
        self.deployment = Deployment(config)
        self._fleet: Fleet
        self._handoff: Handoff | None = None

    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Client session and probes, from start-up to clean-up.

        Raises:
            ConfigError: the servers that are up do not belong together.
        """
        async with open_session(self.config) as session:
            upstream = Upstream(session, self.config)
            roles = Roles(session, self._servers, self.config, self.deployment)
            self._fleet = Fleet(self._prefill, self._decode, upstream, self.metrics, roles.ask)
            await probe_all(session, self._servers, self.config, self.deployment)
            self.deployment.check_start()
            watchers = [
                asyncio.create_task(watch(session, server, self.config, self.deployment))
                for server in self._servers
            ]
            yield
            if self._handoff is not None:
                await self._handoff.finish()
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    def handoff(self) -> Handoff | None:
        """The servers' hand-off; None until one of them has said what it is."""
        if self._handoff is None and self.deployment.engine is not None:
            self._handoff = HANDOFFS[self.deployment.engine](self._fleet)
        return self._handoff

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """POST of a request for an answer."""
        return await Visit(request, self.config, self.metrics, self.drain, self.handoff()).run()

    async def models(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models, from a decode server."""
        request_id = request_id_of(request.headers)
        status = CLIENT_GONE
        try:
            reply = await fetch(self._fleet, MODELS_PATH, to_server(request.headers, request_id))
            status = reply.status
            return web.Response(status=status, headers=to_client(reply.headers, request_id), body=reply.first)
        except ProxyError as error:
            status = error.status
            return error_response(error)
        finally:
            self.metrics.requests.labels(MODELS_PATH, "", status).inc()

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: 200 when a request can be served."""
        able = self._prefill.any_healthy and self._decode.any_healthy
        state = "draining" if self.drain.draining else "ok" if able else "unavailable"
        answer = {
            "status": state,
            "engine": self.deployment.engine,
            "in_flight": self.drain.in_flight,
            "prefill": [_shown(server) for server in self._prefill.servers],
            "decode": [_shown(server) for server in self._decode.servers],
        }
        return web.Response(
            status=200 if state == "ok" else 503,
            body=msgspec.json.encode(answer),
            content_type="application/json",
            headers={} if state == "ok" else {"Retry-After": str(RETRY_AFTER_S)},
        )

    async def show_metrics(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        return web.Response(body=self.metrics.render(), headers={"Content-Type": self.metrics.content_type})


def _shown(server: Server) -> dict[str, object]:
    return {
        "url": server.url,
        "healthy": server.healthy,
        "in_flight": server.in_flight,
        "error": server.last_error or None,
    }


@web.middleware
async def openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """aiohttp's own refusals (404, 405, ...) in OpenAI's shape."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        response = error_response(
            ProxyError(error.status, f"{request.method} {request.path}: {error.reason}")
        )
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response


PROXY: web.AppKey[Proxy] = web.AppKey("proxy", Proxy)


def make_app(config: ProxyConfig) -> web.Application:
    """The proxy as an application.

    Run it with ``handler_cancellation=True`` (``penstock.routers.serve`` does): without it aiohttp lets a
    handler go on after its client left, and the servers would work for nobody.
    """
    app = web.Application(middlewares=[openai_errors], client_max_size=config.max_body_bytes)
    proxy = app[PROXY] = Proxy(config)
    app.cleanup_ctx.append(proxy.lifespan)
    app.add_routes(
        [
            web.post(COMPLETIONS_PATH, proxy.generate),
            web.post(CHAT_PATH, proxy.generate),
            web.post(GENERATE_PATH, proxy.generate),
            web.get(MODELS_PATH, proxy.models),
            web.get("/health", proxy.health),
            web.get("/metrics", proxy.show_metrics),
        ]
    )
    return app
