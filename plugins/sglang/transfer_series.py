"""What FlowKV's transfers came to: on ``/metrics`` as soon as it is known, in the log every ten seconds.

The series of FlowKV under vLLM, as ``sglang:flowkv_...`` and with the labels of the scheduler's own series.
SGLang's processes write theirs to files that the server reads, so no one has to carry them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from prometheus_client import Counter, Histogram

from penstock.connectors.transfer_stats import COUNTERS, HISTOGRAMS, TransferStatsData, summary
from penstock.plugins.sglang.publishing import PREFIX
from penstock.schedulers.client_service import LOG_INTERVAL_S
from penstock.schedulers.waiting import Clock

_labels: dict[str, str] = {}
"""Those of this process's scheduler; none where metrics are off."""


def init_metrics_collector(original: Callable[[Any], None], scheduler: Any) -> None:
    """Around ``Scheduler.init_metrics_collector``, which comes before the transfers are set up."""
    original(scheduler)
    collector = scheduler.metrics_collector
    _labels.clear()
    if collector is not None:
        _labels.update({name: str(value) for name, value in collector.labels.items()})


class TransferSeries:
    """Shows what one rank observes, from any of its threads."""

    def __init__(self, clock: Clock, logger: logging.Logger, labels: Mapping[str, str] = _labels) -> None:
        self._clock = clock
        self._logger = logger
        self._labels = dict(labels)
        self._lock = threading.Lock()
        self._unlogged = TransferStatsData()
        self._logged_s = clock()

    def show(self, seen: TransferStatsData) -> None:
        """Add observations."""
        if seen.is_empty:
            return
        if self._labels:
            self._export(seen)
        with self._lock:
            self._unlogged.add(seen)
            now = self._clock()
            if now - self._logged_s < LOG_INTERVAL_S:
                return
            self._logged_s, told, self._unlogged = now, self._unlogged, TransferStatsData()
        line = ", ".join(f"{name} {value}" for name, value in summary(told.as_dict()).items())
        self._logger.info("penstock: flowkv: %s", line)

    def failed(self, kind: str) -> None:
        """Add one failure; ``kind`` as in ``FlowKVError``."""
        seen = TransferStatsData()
        seen.add_failure(kind)
        self.show(seen)

    def _export(self, seen: TransferStatsData) -> None:
        histograms, counters = declared(tuple(self._labels))
        for key, histogram in histograms.items():
            for value in getattr(seen, key):
                histogram.labels(**self._labels).observe(value)
        for key, counter in counters.items():
            if value := getattr(seen, key):
                counter.labels(**self._labels).inc(value)


@cache
def declared(labels: tuple[str, ...]) -> tuple[dict[str, Histogram], dict[str, Counter]]:
    """The series of this process; a change of roles keeps them."""
    histograms = {
        key: Histogram(PREFIX + name, text, labels, buckets=buckets)
        for key, (name, text, buckets) in HISTOGRAMS.items()
    }
    return histograms, {key: Counter(PREFIX + name, text, labels) for key, (name, text) in COUNTERS.items()}
