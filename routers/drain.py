"""Graceful end: no new requests, those in flight may finish, the rest are cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from penstock.routers.errors import ProxyError

RETRY_AFTER_S = 1
"""Another proxy behind the same name can take the request at once."""


class Drain:
    """Knows the requests in flight and whether new ones are taken."""

    def __init__(self) -> None:
        self.draining = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._cut: set[asyncio.Task[Any]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def in_flight(self) -> int:
        """Requests that have come in and are not finished."""
        return len(self._tasks)

    @contextmanager
    def enter(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """Count ``task``'s request while the context is open.

        Raises:
            ProxyError: 503 when the proxy is draining.
        """
        if self.draining:
            raise ProxyError(503, "the proxy is shutting down", retry_after_s=RETRY_AFTER_S)
        self._tasks.add(task)
        self._empty.clear()
        try:
            yield
        finally:
            self._tasks.discard(task)
            self._cut.discard(task)
            if not self._tasks:
                self._empty.set()

    def is_cut(self, task: asyncio.Task[Any]) -> bool:
        """Whether ``task`` was cancelled by the drain and not by its client's leaving."""
        return task in self._cut

    async def finish(self, timeout_s: float) -> int:
        """Take nothing new, wait for the requests in flight, cut off what is left; how many were cut off."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            pass
        left = set(self._tasks)
        self._cut |= left
        for task in left:
            task.cancel()
        await self._empty.wait()
        return len(left)
