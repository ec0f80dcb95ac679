"""The proxy's Prometheus metrics, one registry an application."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from penstock.routers.pool import Server

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class ServerState(Collector):
    """Gauges read from the servers when they are asked for."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self._servers = list(servers)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One sample a server for requests in flight and for health."""
        labels = ["role", "server"]
        in_flight = GaugeMetricFamily("penstock_proxy_in_flight", "Requests at a server", labels=labels)
        healthy = GaugeMetricFamily(
            "penstock_proxy_server_healthy", "1 when it takes requests", labels=labels
        )
        for server in self._servers:
            in_flight.add_metric([server.role, server.url], server.in_flight)
            healthy.add_metric([server.role, server.url], float(server.healthy))
        yield in_flight
        yield healthy


class Metrics:
    """Every counter and histogram of the proxy."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(ServerState(servers))
        self.requests = self._counter("requests", "Requests answered", "route", "mode", "status")
        self.retries = self._counter("retries", "Second tries on another server", "role")
        self.disconnects = self._counter("disconnects", "Clients that left, by stage of the request", "stage")
        self.stranded = self._counter(
            "stranded_handoffs", "Hand-offs that no decode server is known to have used up", "reason"
        )
        self.returned = self._counter(
            "returned_handoffs", "Stranded hand-offs given back; leases free the others"
        )
        self.without_handoff = self._counter(
            "prefills_without_handoff", "Prefills answered without kv_transfer_params"
        )
        self.broken_streams = self._counter("broken_streams", "Answers that ended too early")
        self.prefill_seconds = self._histogram("prefill_seconds", "Prefill step, as seen by the proxy")
        self.decode_seconds = self._histogram("decode_seconds", "Answer of the decode server, to its end")
        self.ttft_seconds = self._histogram("ttft_seconds", "Request to first byte of a streamed answer")

    content_type = CONTENT_TYPE_LATEST
    """Of ``render``."""

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"penstock_proxy_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"penstock_proxy_{name}", text, buckets=SECONDS, registry=self.registry)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
