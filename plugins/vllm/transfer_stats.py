"""Transfer statistics in vLLM's terms: the interval log line and Prometheus, named as NIXL's are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from penstock.connectors.transfer_stats import COUNTERS, HISTOGRAMS, TransferStatsData, summary

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric, PromMetricT


class FlowKVStats(KVConnectorStats):
    """Carries :class:`TransferStatsData` as plain lists and numbers between vLLM's processes."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or TransferStatsData().as_dict())

    def reset(self) -> None:
        """Forget all observations."""
        self.data = TransferStatsData().as_dict()

    def is_empty(self) -> bool:
        """True when there is nothing to log or export."""
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another process's observations."""
        self.data = {name: value + other.data[name] for name, value in self.data.items()}
        return self

    def reduce(self) -> dict[str, int | float]:
        """The fields of NIXL's interval line, and FlowKV's own guards."""
        return summary(self.data)


class FlowKVPromMetrics(KVConnectorPromMetrics):
    """The same figures as Prometheus series, one set an engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._histograms = {
            key: create_metric_per_engine(
                self._histogram_cls(
                    name=f"vllm:{name}", documentation=text, buckets=buckets, labelnames=labelnames
                ),
                per_engine_labelvalues,
            )
            for key, (name, text, buckets) in HISTOGRAMS.items()
        }
        self._counters = {
            key: create_metric_per_engine(
                self._counter_cls(name=f"vllm:{name}", documentation=text, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for key, (name, text) in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Export one interval's observations."""
        for key, histogram in self._histograms.items():
            for value in transfer_stats_data[key]:
                histogram[engine_idx].observe(value)
        for key, counter in self._counters.items():
            if value := transfer_stats_data[key]:
                counter[engine_idx].inc(value)
