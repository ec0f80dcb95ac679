"""Prometheus series of sparse attention, in the process that serves ``/metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from prometheus_client import Gauge

from penstock.patches.gauges import ENGINE, engine_gauge

TOTALS = {
    "selections": "Times that a layer chose pages for a request.",
    "measurements": "Exact masses that were computed, of query heads.",
    "selection_seconds": "Time that choosing took, without indexing and measuring.",
    "measuring_seconds": "Time that exact masses took.",
    "index_blocks": "Blocks that were summarised, a layer.",
    "index_seconds": "Time that summaries took.",
    "index_bytes": "Memory of the index if every block is summarised.",
    "cache_bytes": "Memory of the KV cache of the layers that have an index.",
}
"""Totals since the start, but for the bytes. Each is a series ``penstock_sparse_<name>``."""


class SparseGauges:
    """Shows the latest totals of each engine.

    ``prefix`` goes before the names of the series, ``engine_labels`` say which engine a series is of.
    """

    def __init__(self, prefix: str = "", engine_labels: Sequence[str] = ENGINE) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return engine_gauge(f"{prefix}penstock_sparse_{name}", text, engine_labels, *labels)

        self._mass = gauge(
            "attained_mass",
            "Quantile of the attention mass of what query heads read, as measured on samples.",
            "quantile",
        )
        self._read = gauge("pages_read", "Pages that KV heads read where pages were chosen.", "layer")
        self._pages = gauge("pages", "Pages that they could have read.", "layer")
        self._dense = gauge("dense_selections", "Times that a layer was dense for a request.", "reason")
        self._totals = {name: gauge(name, text) for name, text in TOTALS.items()}

    def show(self, payload: dict[str, Any], *engine: str) -> None:
        """Replace what is shown of one engine, named by the values of ``engine_labels``."""
        for quantile, mass in payload["masses"].items():
            self._mass.labels(*engine, quantile).set(mass)
        for layer, (read, pages) in payload["layers"].items():
            self._read.labels(*engine, layer).set(read)
            self._pages.labels(*engine, layer).set(pages)
        for reason, count in payload["dense"].items():
            self._dense.labels(*engine, reason).set(count)
        for name, value in payload["totals"].items():
            self._totals[name].labels(*engine).set(value)


@cache
def sparse_gauges(prefix: str = "", engine_labels: tuple[str, ...] = ENGINE) -> SparseGauges:
    """The series of this process."""
    return SparseGauges(prefix, engine_labels)
