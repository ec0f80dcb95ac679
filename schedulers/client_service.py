"""What each client has had, summed up for metrics and log lines."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

from penstock.schedulers.waiting import ClientService, WaitingOrder

REST = "(rest)"
"""Sums up the clients that have no metrics of their own; a client of this name is counted with them."""
NOBODY = "(unnamed)"
EXPORT_INTERVAL_S = 1.0
LOG_INTERVAL_S = 10.0


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

    def line(self, policy: str) -> str:
        """One line for a log; empty while there are no clients."""
        if not self.known:
            return ""
        rows = ", ".join(
            f"{row.client}: {row.service:.0f} (standing {row.standing:.0f}, {row.waiting} waiting)"
            for row in self.shown[:3]
        )
        return f"{policy}: {self.known} clients, Jain index {self.jain:.3f}, weighted tokens served: {rows}"


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
