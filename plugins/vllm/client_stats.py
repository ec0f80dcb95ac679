"""What each client has had, for the interval log line and for the front end's metrics.

A scheduler's statistics reach the front end inside vLLM's ``SchedulerStats``, which has no field for others.
The one that is an open dictionary, ``kv_connector_stats``, carries ours under a key of its own, and the front
end takes them out before vLLM looks (``patches/vllm/stat_logging.py``). They travel only where the front end
is known to do so.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from penstock.patches.vllm.stat_logging import PAYLOAD_KEY
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.waiting import ClientService, Clock, WaitingOrder

REST = "(rest)"
"""Sums up the clients that have no metrics of their own; a client of this name is counted with them."""
NOBODY = "(unnamed)"
EXPORT_INTERVAL_S = 1.0
LOG_INTERVAL_S = 10.0

logger = logging.getLogger("vllm.penstock")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The clients with the most service, the sum of the others, and how even the service is."""

    shown: tuple[ClientService, ...]
    rest: ClientService
    known: int
    jain: float

    def as_dict(self, policy: str) -> dict[str, Any]:
        """Plain values, which cross processes."""
        rows = [*self.shown, self.rest] if self.known > len(self.shown) else [*self.shown]
        clients = {
            row.client: [row.extend_tokens, row.output_tokens, row.service, row.standing, row.waiting]
            for row in rows
        }
        return {"policy": policy, "known": self.known, "jain": self.jain, "clients": clients}


def jain_index(service: list[float]) -> float:
    """How even a division is: 1 for equal parts, 1/n where one of n has all (Jain, Chiu, Hawe 1984, eq. 1);
    1 where there is nothing to divide."""
    squares = sum(value * value for value in service)
    return sum(service) ** 2 / (len(service) * squares) if squares else 1.0


def snapshot(order: WaitingOrder, shown: int) -> Snapshot:
    """What the remembered clients have had, those aside that have neither had nor want any. O(clients)."""
    rows = [_named(row) for row in order.clients() if row.service or row.waiting]
    top = heapq.nlargest(shown, (row for row in rows if row.client != REST), key=lambda row: row.service)
    names = {row.client for row in top}
    others = [row for row in rows if row.client not in names]
    rest = ClientService(
        client=REST,
        extend_tokens=sum(row.extend_tokens for row in others),
        output_tokens=sum(row.output_tokens for row in others),
        service=sum(row.service for row in others),
        standing=sum(row.standing for row in others),
        waiting=sum(row.waiting for row in others),
    )
    return Snapshot(tuple(top), rest, len(rows), jain_index([row.service for row in rows]))


def _named(row: ClientService) -> ClientService:
    if row.client:
        return row
    return ClientService(NOBODY, row.extend_tokens, row.output_tokens, row.service, row.standing, row.waiting)


class ClientStats:
    """Adds snapshots to vLLM's statistics at intervals of ``clock``, and logs them at longer ones.

    ``settle`` is called before one is taken, to charge ``order`` with what it was not charged with yet.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        order: WaitingOrder,
        clock: Clock,
        *,
        settle: Callable[[], None],
        export: bool,
    ) -> None:
        self._config = config
        self._order = order
        self._clock = clock
        self._settle = settle
        self._export = export
        self._exported_s = self._logged_s = clock()

    def add_to(self, stats: Any, *, idle: bool) -> None:
        """Put a snapshot into a ``SchedulerStats`` if one is due. An ``idle`` engine makes no statistics
        until its next request, so its last ones are never left out."""
        now = self._clock()
        export = self._export and (idle or now - self._exported_s >= EXPORT_INTERVAL_S)
        log = now - self._logged_s >= LOG_INTERVAL_S
        if not export and not log:
            return
        self._settle()
        found = snapshot(self._order, self._config.shown_clients)
        if export:
            self._exported_s = now
            payload = {PAYLOAD_KEY: found.as_dict(self._config.policy)}
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), **payload}
        if log:
            self._logged_s = now
            self._log(found)

    def _log(self, found: Snapshot) -> None:
        if found.known == 0:
            return
        rows = ", ".join(
            f"{row.client}: {row.service:.0f} (standing {row.standing:.0f}, {row.waiting} waiting)"
            for row in found.shown[:3]
        )
        logger.info(
            "penstock: %s: %d clients, Jain index %.3f, weighted tokens served: %s",
            self._config.policy,
            found.known,
            found.jain,
            rows,
        )
