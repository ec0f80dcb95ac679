"""Hand-offs that no decode server will take up, given back before their lease runs out.

Only the KV connector of a decode server can release what a prefill server holds for it. vLLM tells its
connector of every request with ``kv_transfer_params`` that its front-end refuses (0.30 and later, see
``AsyncLLM.notify_kv_transfer_request_rejected``), so a request made to be refused carries the hand-off back,
whatever the connector.
"""

from __future__ import annotations

import asyncio
import logging

from multidict import CIMultiDict

from penstock.routers.bodies import Body, encode_body
from penstock.routers.errors import UpstreamFailure
from penstock.routers.metrics import Metrics
from penstock.routers.pool import Pool, Server
from penstock.routers.upstream import Upstream

logger = logging.getLogger(__name__)

NO_MODEL = "penstock-returns-a-hand-off"
"""A name that no server serves: vLLM looks at the model before anything else."""

PATIENCE_S = 10.0
"""For one server to answer; a return that takes longer comes too late to be of use."""


def refused_body(params: Body) -> Body:
    """A completion request that a server refuses, with the hand-off ``params`` on it.

    Were it served all the same, it would cost one token.
    """
    return {"model": NO_MODEL, "prompt": [0], "max_tokens": 1, "kv_transfer_params": params}


class Returns:
    """Gives hand-offs back in the background, while the requests that they belonged to are over."""

    PATH = "/v1/completions"

    def __init__(self, decode: Pool, upstream: Upstream, metrics: Metrics) -> None:
        self._decode = decode
        self._upstream = upstream
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def give_back(self, params: Body, headers: CIMultiDict[str], reason: str) -> None:
        """Count a hand-off that is stranded for ``reason`` and try to return it."""
        self._metrics.stranded.labels(reason).inc()
        task = asyncio.create_task(self._carry(params, headers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait for what is under way, at most twice ``PATIENCE_S``."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def _carry(self, params: Body, headers: CIMultiDict[str]) -> None:
        """Try two servers; where both fail, the lease frees the blocks."""
        body = encode_body(refused_body(params))
        tried: list[Server] = []
        while len(tried) < 2 and (server := self._decode.pick(exclude=tried)) is not None:
            tried.append(server)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._upstream.ask(server, self.PATH, body, headers)
            except (TimeoutError, UpstreamFailure) as error:
                logger.info("%s did not take a hand-off back: %s", server.url, error or "too slow")
            else:
                self._metrics.returned.inc()
                return
