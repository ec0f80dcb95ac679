"""Health of the servers: one task a server asks ``/health``, and what it is when it comes up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress

import aiohttp

from penstock.routers.config import ProxyConfig
from penstock.routers.discovery import Deployment, Misfit, NotReady
from penstock.routers.pool import Server

log = logging.getLogger("penstock.proxy")


async def probe(
    session: aiohttp.ClientSession, server: Server, config: ProxyConfig, deployment: Deployment
) -> None:
    """Ask ``server`` once and write the outcome into it. One that comes up is asked what it is, too, and one
    that may change roles which it has."""
    timeout = probe_timeout(config)
    try:
        async with session.get(f"{server.url}/health", timeout=timeout) as response:
            status = response.status
        if status != 200:
            server.probe_failed(f"/health answered {status}")
            return
        if not server.healthy:
            await deployment.admit(session, server, timeout)
        elif server.may_switch:
            await deployment.follow(session, server, timeout)
        server.mark_up()
    except (Misfit, NotReady) as reason:
        server.probe_failed(str(reason))
    except aiohttp.ClientConnectorError as error:
        server.probe_failed(f"no connection: {error.strerror or type(error).__name__}")
        server.healthy = False
    except TimeoutError:
        server.probe_failed(f"no answer within {config.probe_timeout_s} s")
    except aiohttp.ClientError as error:
        server.probe_failed(f"it broke off: {type(error).__name__}")


class Roles:
    """Asks the servers that may change roles which they have, when traffic gives a reason to."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        servers: Iterable[Server],
        config: ProxyConfig,
        deployment: Deployment,
    ) -> None:
        self._session = session
        self._servers = list(servers)
        self._timeout = probe_timeout(config)
        self._deployment = deployment
        self._asking = asyncio.Lock()
        self._times = 0

    async def ask(self) -> None:
        """The roles are those that the servers have after this call began; who does not say keeps its own.
        All who wait for an earlier question to end share the next one."""
        came = self._times
        async with self._asking:
            if self._times == came:
                self._times += 1
                able = (server for server in self._servers if server.may_switch and server.healthy)
                await asyncio.gather(*map(self._ask, able))

    async def _ask(self, server: Server) -> None:
        with suppress(NotReady, aiohttp.ClientError, TimeoutError):
            await self._deployment.follow(self._session, server, self._timeout)


def probe_timeout(config: ProxyConfig) -> aiohttp.ClientTimeout:
    """Of one question to a server."""
    return aiohttp.ClientTimeout(total=config.probe_timeout_s, sock_connect=config.connect_timeout_s)


async def watch(
    session: aiohttp.ClientSession, server: Server, config: ProxyConfig, deployment: Deployment
) -> None:
    """Probe ``server`` for ever: at the interval while it is well, with backoff while it is not.

    Traffic can ask for a probe before the interval is over; it cannot shorten the backoff.
    """
    healthy = server.healthy
    while True:
        server.probe_now.clear()
        await probe(session, server, config, deployment)
        healthy = _report(server, healthy)
        if healthy:
            # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(_delay_s(server, config)):
                    await server.probe_now.wait()
            healthy = _report(server, healthy)
        if not healthy:
            await asyncio.sleep(_delay_s(server, config))


def _delay_s(server: Server, config: ProxyConfig) -> float:
    return server.probe_delay_s(config.probe_interval_s, config.backoff_base_s, config.backoff_max_s)


def _report(server: Server, was_healthy: bool) -> bool:
    """Log a change of health; the health."""
    if server.healthy and not was_healthy:
        log.info("%s server %s takes requests", server.role, server.url)
    elif was_healthy and not server.healthy:
        log.warning("%s server %s is put aside: %s", server.role, server.url, server.last_error)
    return server.healthy


async def probe_all(
    session: aiohttp.ClientSession, servers: Iterable[Server], config: ProxyConfig, deployment: Deployment
) -> None:
    """Probe every server once, side by side."""
    await asyncio.gather(*(probe(session, server, config, deployment) for server in servers))
