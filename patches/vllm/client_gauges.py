"""Prometheus series of the clients of a request scheduler, in the process that serves ``/metrics``."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from prometheus_client import Gauge

LABELS = ("engine", "client")
PER_CLIENT = {
    "penstock_client_extend_tokens": "Prompt tokens computed for a client.",
    "penstock_client_output_tokens": "Tokens generated for a client.",
    "penstock_client_service_tokens": "Weighted tokens that a client has had.",
    "penstock_client_standing_tokens": "Deficit (dlpm) or virtual counter (vtc) of a client.",
    "penstock_client_waiting_requests": "Requests of a client that wait.",
}
"""In the order in which a payload lists a client's values."""


class ClientGauges:
    """Shows the latest snapshot of each engine; series of clients that are shown no more disappear."""

    def __init__(self) -> None:
        # As vLLM does for its gauges: several front ends hear of one engine in turn.
        mode: Any = "mostrecent"
        self._clients = [
            Gauge(name, text, LABELS, multiprocess_mode=mode) for name, text in PER_CLIENT.items()
        ]
        self._jain = Gauge(
            "penstock_client_jain_index",
            "How evenly the remembered clients were served, 1 for equal parts.",
            ("engine",),
            multiprocess_mode=mode,
        )
        self._known = Gauge(
            "penstock_clients_known",
            "Clients that the scheduler remembers.",
            ("engine", "policy"),
            multiprocess_mode=mode,
        )
        self._shown: dict[int, set[str]] = {}

    def show(self, payload: dict[str, Any], engine: int) -> None:
        """Replace what is shown of one engine."""
        label = str(engine)
        clients: dict[str, list[float]] = payload["clients"]
        for name in self._shown.get(engine, set()) - clients.keys():
            self._drop(label, name)
        self._shown[engine] = set(clients)
        for name, values in clients.items():
            for gauge, value in zip(self._clients, values, strict=True):
                gauge.labels(label, name).set(value)
        self._jain.labels(label).set(payload["jain"])
        self._known.labels(label, payload["policy"]).set(payload["known"])

    def _drop(self, label: str, name: str) -> None:
        for gauge in self._clients:
            if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
                # Series in files of several processes cannot be removed.
                gauge.labels(label, name).set(0)
            else:
                gauge.remove(label, name)


@cache
def gauges() -> ClientGauges:
    """The series of this process."""
    return ClientGauges()
