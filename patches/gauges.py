"""Prometheus gauges of engines, of which a process that serves ``/metrics`` hears."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Gauge

ENGINE = ("engine",)
"""The label by which our own series tell engines apart."""


def engine_gauge(name: str, text: str, engine_labels: Sequence[str], *labels: str) -> Gauge:
    """A gauge whose first labels say which engine a series is of, and ``labels`` what else.

    Several processes hear of one engine in turn, so that the latest value holds, as for the engines' own.
    """
    return Gauge(name, text, (*engine_labels, *labels), multiprocess_mode="mostrecent")
