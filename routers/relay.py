"""An answer on its way to the client: byte for byte, as it comes, at the client's pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from enum import StrEnum

from aiohttp import web
from multidict import CIMultiDict

from penstock.routers.errors import StreamBroken, error_event


class Outcome(StrEnum):
    """How an answer that had begun came to its end."""

    COMPLETE = "complete"
    BROKEN = "broken"
    """The server went away."""
    CUT = "cut"
    """The proxy shut down."""
    CLIENT_GONE = "client_gone"


async def send(
    request: web.Request,
    status: int,
    headers: CIMultiDict[str],
    chunks: AsyncIterator[bytes],
    *,
    on_first: Callable[[], None],
    is_cut: Callable[[], bool],
) -> tuple[web.StreamResponse, Outcome]:
    """Answer ``request`` with ``chunks``; an answer that ends too early is never marked as complete.

    Args:
        on_first: called when the headers are out and the first bytes follow.
        is_cut: whether a cancellation comes from the proxy's shut-down; any other one is raised again.
    """
    response = web.StreamResponse(status=status, headers=headers)
    sender = _Sender(request, response)
    try:
        await response.prepare(request)
        on_first()
        try:
            async for chunk in chunks:
                await sender.write(chunk)
        except StreamBroken as error:
            await sender.abort(502, f"the answer is incomplete: {error}")
            return response, Outcome.BROKEN
        except asyncio.CancelledError:
            if not is_cut():
                raise
            await sender.abort(503, "the answer is incomplete: the proxy is shutting down")
            return response, Outcome.CUT
        await response.write_eof()
    except ConnectionError:
        return response, Outcome.CLIENT_GONE
    return response, Outcome.COMPLETE


class _Sender:
    """Writes a body and remembers whether it stands at the border between two events."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._response = response
        self._last = b"\n\n"

    async def write(self, chunk: bytes) -> None:
        await self._response.write(chunk)
        self._last = (self._last + chunk)[-4:]

    async def abort(self, status: int, message: str) -> None:
        """Tell a reader of events what happened, and close without the mark of a complete body."""
        if self._response.headers.get("Content-Type", "").startswith("text/event-stream"):
            gap = b"" if self._last.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
            await self._response.write(gap + error_event(status, message))
        self._response.force_close()
        if self._request.transport is not None:
            self._request.transport.close()
