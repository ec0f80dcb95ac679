"""Health of the servers: one task a server asks ``/health``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

import aiohttp

from penstock.routers.config import ProxyConfig
from penstock.routers.pool import Server


async def probe(session: aiohttp.ClientSession, server: Server, config: ProxyConfig) -> None:
    """Ask ``server`` once and write the outcome into it."""
    timeout = aiohttp.ClientTimeout(total=config.probe_timeout_s, sock_connect=config.connect_timeout_s)
    try:
        async with session.get(f"{server.url}/health", timeout=timeout) as response:
            if response.status == 200:
                server.mark_up()
            else:
                server.probe_failed(f"/health answered {response.status}")
    except aiohttp.ClientConnectorError as error:
        server.probe_failed(f"no connection: {error.strerror or type(error).__name__}")
        server.healthy = False
    except TimeoutError:
        server.probe_failed(f"/health gave no answer within {config.probe_timeout_s} s")
    except aiohttp.ClientError as error:
        server.probe_failed(f"/health broke off: {type(error).__name__}")


async def watch(session: aiohttp.ClientSession, server: Server, config: ProxyConfig) -> None:
    """Probe ``server`` for ever: at the interval while it is well, with backoff while it is not.

    Traffic can ask for a probe before the interval is over; it cannot shorten the backoff.
    """
    while True:
        server.probe_now.clear()
        await probe(session, server, config)
        if server.healthy:
            delay = server.probe_delay_s(config.probe_interval_s, config.backoff_base_s, config.backoff_max_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(server.probe_now.wait(), delay)
        if not server.healthy:
            delay = server.probe_delay_s(config.probe_interval_s, config.backoff_base_s, config.backoff_max_s)
            await asyncio.sleep(delay)


async def probe_all(session: aiohttp.ClientSession, servers: Iterable[Server], config: ProxyConfig) -> None:
    """Probe every server once, side by side."""
    await asyncio.gather(*(probe(session, server, config) for server in servers))
