"""Running the proxy: listen, report, drain on SIGTERM or Ctrl-C, stop at once on a second one."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from aiohttp import web

from penstock.routers.app import PROXY, make_app
from penstock.routers.config import ProxyConfig

BACKLOG = 1024
"""Connections that wait to be accepted; with a short queue a burst of clients waits for TCP's retries."""

log = logging.getLogger("penstock.proxy")


async def serve(config: ProxyConfig, *, access_log: bool, announce: Callable[[str], None]) -> int:
    """Serve until a signal ends it; how many requests were cut off.

    ``announce`` is called with the proxy's URL when it accepts connections.

    Raises:
        OSError: the address cannot be bound.
    """
    app = make_app(config)
    proxy = app[PROXY]
    runner = web.AppRunner(
        app,
        handle_signals=False,
        handler_cancellation=True,
        access_log=logging.getLogger("penstock.proxy.access") if access_log else None,
        shutdown_timeout=1.0,
    )
    stop, now = _signals()
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port, backlog=BACKLOG)
        await site.start()
        host, port = runner.addresses[0][:2]
        announce(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        await stop.wait()
        log.info("draining %d requests, at most %s s", proxy.drain.in_flight, config.drain_timeout_s)
        draining = asyncio.create_task(proxy.drain.finish(config.drain_timeout_s))
        second = asyncio.create_task(now.wait())
        await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if not draining.done():
            draining.cancel()
            return await proxy.drain.finish(0)
        return draining.result()
    finally:
        await runner.cleanup()


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events that the first and the second SIGTERM or SIGINT set."""
    stop, now = asyncio.Event(), asyncio.Event()

    def received() -> None:
        (now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received)
    return stop, now
