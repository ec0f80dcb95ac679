"""Prometheus series of the clients of a request scheduler."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from penstock.patches.gauges import ENGINE, engine_gauge
from penstock.schedulers.client_service import REST

PER_CLIENT = {
    "penstock_client_extend_tokens": "Prompt tokens computed for a client.",
    "penstock_client_output_tokens": "Tokens generated for a client.",
    "penstock_client_service_tokens": "Weighted tokens that a client has had.",
    "penstock_client_standing_tokens": "Deficit (dlpm) or virtual counter (vtc) of a client.",
    "penstock_client_waiting_requests": "Requests of a client that wait.",
}
"""In the order in which a payload lists a client's values."""
MOST_NAMES = 200
"""Names that one engine's series bear in all where series cannot be removed; further clients are shown with
the rest."""


class ClientGauges:
    """Shows the latest snapshot of each engine; series of clients that are shown no more disappear, or fall
    to 0 where several processes write series to files.

    ``prefix`` goes before the names of the series, ``engine_labels`` say which engine a series is of.
    """

    def __init__(self, prefix: str = "", engine_labels: Sequence[str] = ENGINE) -> None:
        self._clients = [
            engine_gauge(prefix + name, text, engine_labels, "client") for name, text in PER_CLIENT.items()
        ]
        self._jain = engine_gauge(
            f"{prefix}penstock_client_jain_index",
            "How evenly the remembered clients were served, 1 for equal parts.",
            engine_labels,
        )
        self._known = engine_gauge(
            f"{prefix}penstock_clients_known",
            "Clients that the scheduler remembers.",
            engine_labels,
            "policy",
        )
        self._shown: dict[tuple[str, ...], set[str]] = {}
        self._names: dict[tuple[str, ...], set[str]] = {}

    def show(self, payload: dict[str, Any], *engine: str) -> None:
        """Replace what is shown of one engine, named by the values of ``engine_labels``."""
        clients: dict[str, list[float]] = payload["clients"]
        if in_files := "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            clients = self._bounded(clients, engine)
        for name in self._shown.get(engine, set()) - clients.keys():
            for gauge in self._clients:
                if in_files:
                    gauge.labels(*engine, name).set(0)
                else:
                    gauge.remove(*engine, name)
        self._shown[engine] = set(clients)
        for name, values in clients.items():
            for gauge, value in zip(self._clients, values, strict=True):
                gauge.labels(*engine, name).set(value)
        self._jain.labels(*engine).set(payload["jain"])
        self._known.labels(*engine, payload["policy"]).set(payload["known"])

    def _bounded(self, clients: dict[str, list[float]], engine: tuple[str, ...]) -> dict[str, list[float]]:
        """``clients`` without names that would be too many, whose values are added to the rest."""
        names = self._names.setdefault(engine, set())
        shown: dict[str, list[float]] = {}
        for name, values in clients.items():
            if name != REST and name not in names and len(names) >= MOST_NAMES:
                name = REST  # noqa: PLW2901
            names.add(name)
            shown[name] = (
                [a + b for a, b in zip(shown[name], values, strict=True)] if name in shown else values
            )
        return shown


@cache
def client_gauges(prefix: str = "", engine_labels: tuple[str, ...] = ENGINE) -> ClientGauges:
    """The series of this process."""
    return ClientGauges(prefix, engine_labels)
