"""Servers of one role: which are healthy, how busy they are, which one is next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["prefill", "decode"]

PROBE_FAILURES_TOLERATED = 2
"""A busy server may answer probes late; three failures in a row mean that it is not well."""


@dataclass(slots=True, eq=False)
class Server:
    """One engine server. It counts as unhealthy until its first good probe.

    ``role`` is the one that it was given, and for a server that ``may_switch`` the one that it last said.
    """

    role: Role
    url: str
    in_flight: int = 0
    healthy: bool = False
    bootstrap_port: int | None = None
    """Where SGLang's decode servers ask this prefill server; None where that is unknown or not needed."""
    may_switch: bool = False
    """Whether it changes roles while it runs."""
    failures: int = 0
    """Failed connections and probes since the last good one."""
    last_error: str = "not probed yet"
    last_pick: int = 0
    """Number of the pick that chose this server last; orders servers that are equally busy."""
    probe_now: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when something in traffic gives a reason to ask ``/health`` before the next interval."""
    _on_switch: set[Callable[[], None]] = field(default_factory=set)

    def switch(self, role: Role) -> None:
        """It has another role from now on: what is asked of it in its old one will not be answered."""
        self.role = role
        for give_up in list(self._on_switch):
            give_up()

    @contextmanager
    def told_of_switch(self, give_up: Callable[[], None]) -> Iterator[None]:
        """Call ``give_up`` when the role changes while the context is open."""
        self._on_switch.add(give_up)
        try:
            yield
        finally:
            self._on_switch.discard(give_up)

    def mark_up(self) -> None:
        """A probe succeeded."""
        self.healthy, self.failures, self.last_error = True, 0, ""

    def mark_down(self, reason: str) -> None:
        """A connection could not be opened: no request goes here until a probe succeeds."""
        if self.healthy:
            self.failures += 1
        self.healthy = False
        self.last_error = reason
        self.probe_now.set()

    def suspect(self) -> None:
        """A connection broke: that may be one connection or the whole server; a probe tells."""
        self.probe_now.set()

    def probe_failed(self, reason: str) -> None:
        """A probe failed; a healthy server is forgiven ``PROBE_FAILURES_TOLERATED`` in a row."""
        self.failures += 1
        self.last_error = reason
        if self.failures > PROBE_FAILURES_TOLERATED:
            self.healthy = False

    def probe_delay_s(self, interval_s: float, base_s: float, max_s: float) -> float:
        """Seconds until the next probe: the interval when all is well, else exponential backoff."""
        if not self.failures:
            return interval_s
        return min(max_s, base_s * 2.0 ** min(max(self.failures - 1, 0), 32))


class Pool:
    """Those of ``everybody`` that have one role now, chosen by least requests in flight, round robin among
    equals."""

    def __init__(self, role: Role, everybody: Sequence[Server]) -> None:
        self.role: Role = role
        self._everybody = everybody
        self._picks = 0

    @property
    def servers(self) -> list[Server]:
        """The servers of the role, in the order in which they were given."""
        return [server for server in self._everybody if server.role == self.role]

    @property
    def any_healthy(self) -> bool:
        """Whether a request can be placed."""
        return any(server.healthy for server in self.servers)

    def pick(self, exclude: Collection[Server] = ()) -> Server | None:
        """The healthy server with the fewest requests in flight, or None."""
        able = [s for s in self.servers if s.healthy and s not in exclude]
        if not able:
            return None
        server = min(able, key=lambda s: (s.in_flight, s.last_pick))
        self._picks += 1
        server.last_pick = self._picks
        return server

    @contextmanager
    def occupy(self, server: Server) -> Iterator[None]:
        """Count one request in flight at ``server`` while the context is open."""
        server.in_flight += 1
        try:
            yield
        finally:
            server.in_flight -= 1
