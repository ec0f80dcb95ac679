"""Transfer statistics in vLLM's terms: the interval log line and Prometheus, named as NIXL's are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from penstock.connectors.transports.base import TransferStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric, PromMetricT

SECONDS = [0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0]
BYTES = [2.0 ** (10 + i) for i in range(1, 25, 2)]
DESCRIPTORS = [1, 2, 4, 8, 16, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000]

HISTOGRAMS: dict[str, tuple[str, str, list[float]]] = {
    "transfer_s": ("flowkv_xfer_time_seconds", "Duration of a KV transfer, post included.", SECONDS),
    "post_s": ("flowkv_post_time_seconds", "Time to plan, prepare and post a KV transfer.", SECONDS),
    "num_bytes": ("flowkv_bytes_transferred", "Bytes of a KV transfer.", BYTES),
    "num_descriptors": (
        "flowkv_num_descriptors",
        "Descriptors of a KV transfer.",
        list(map(float, DESCRIPTORS)),
    ),
}
COUNTERS: dict[str, tuple[str, str]] = {
    "failed_transfers": ("flowkv_num_failed_transfers", "KV transfers that failed in the transport."),
    "failed_handshakes": (
        "flowkv_num_failed_handshakes",
        "Hand-offs refused: bad parameters, incompatible or unreachable peers.",
    ),
    "expired_leases": (
        "flowkv_num_expired_leases",
        "Prompts whose blocks went back to the pool before the decode side read them.",
    ),
    "stale_reads_refused": (
        "flowkv_num_stale_reads_refused",
        "Reads that ended after the lease had; their bytes were thrown away.",
    ),
    "digest_mismatches": (
        "flowkv_num_digest_mismatches",
        "Transfers whose bytes were not what the sender hashed; they were thrown away.",
    ),
}
FAILURE_COUNTER = {
    "transfer": "failed_transfers",
    "handshake": "failed_handshakes",
    "params": "failed_handshakes",
    "message": "failed_handshakes",
    "stale": "stale_reads_refused",
    "digest": "digest_mismatches",
}


@dataclass(slots=True)
class TransferStatsData:
    """Observations of one process since the last step that reported."""

    transfer_s: list[float] = field(default_factory=list)
    post_s: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    num_descriptors: list[int] = field(default_factory=list)
    failed_transfers: int = 0
    failed_handshakes: int = 0
    expired_leases: int = 0
    stale_reads_refused: int = 0
    digest_mismatches: int = 0

    @property
    def is_empty(self) -> bool:
        """Nothing to report."""
        return not self.transfer_s and not any(getattr(self, name) for name in COUNTERS)

    def add_transfer(self, stats: TransferStats) -> None:
        """One transfer that ended well."""
        self.transfer_s.append(stats.transfer_s)
        self.post_s.append(stats.post_s)
        self.num_bytes.append(stats.num_bytes)
        self.num_descriptors.append(stats.num_descriptors)

    def add_failure(self, kind: str) -> None:
        """One load that failed; ``kind`` as in ``FlowKVError``."""
        name = FAILURE_COUNTER[kind]
        setattr(self, name, getattr(self, name) + 1)


class FlowKVStats(KVConnectorStats):
    """Carries :class:`TransferStatsData` as plain lists and numbers between vLLM's processes."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or asdict(TransferStatsData()))

    def reset(self) -> None:
        """Forget all observations."""
        self.data = asdict(TransferStatsData())

    def is_empty(self) -> bool:
        """True when there is nothing to log or export."""
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another process's observations."""
        self.data = {name: value + other.data[name] for name, value in self.data.items()}
        return self

    def reduce(self) -> dict[str, int | float]:
        """The fields of NIXL's interval line, and FlowKV's own guards."""
        count = len(self.data["transfer_s"])
        line: dict[str, int | float] = {"Num successful transfers": count}
        if count:
            seconds = np.array(self.data["transfer_s"])
            post = np.array(self.data["post_s"])
            mib = np.array(self.data["num_bytes"]) / 2**20
            line |= {
                "Avg xfer time (ms)": round(float(seconds.mean()) * 1e3, 3),
                "P90 xfer time (ms)": round(float(np.percentile(seconds, 90)) * 1e3, 3),
                "Avg post time (ms)": round(float(post.mean()) * 1e3, 3),
                "P90 post time (ms)": round(float(np.percentile(post, 90)) * 1e3, 3),
                "Avg MB per transfer": round(float(mib.mean()), 3),
                "Throughput (MB/s)": round(float(mib.sum() / seconds.sum()), 3),
                "Avg number of descriptors": round(float(np.mean(self.data["num_descriptors"])), 1),
            }
        return line | {f"Num {name.replace('_', ' ')}": self.data[name] for name in COUNTERS}


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
