"""What transfers came to, in one set of names for every engine: the figures of NIXL's telemetry, and FlowKV's
own guards. An engine's adapter shows them on ``/metrics``, with the engine's name before theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from penstock.connectors.transports.base import TransferStats

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
    """Observations of one process since it last reported."""

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

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, which cross processes."""
        return asdict(self)

    def add(self, other: TransferStatsData) -> None:
        """Add another's observations."""
        for name, value in other.as_dict().items():
            setattr(self, name, getattr(self, name) + value)

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


def summary(data: Mapping[str, Any]) -> dict[str, int | float]:
    """The fields of NIXL's interval line, and FlowKV's own guards.

    Args:
        data: the fields of :class:`TransferStatsData`, of as many processes as were added up.
    """
    count = len(data["transfer_s"])
    line: dict[str, int | float] = {"Num successful transfers": count}
    if count:
        seconds = np.array(data["transfer_s"])
        post = np.array(data["post_s"])
        mib = np.array(data["num_bytes"]) / 2**20
        line |= {
            "Avg xfer time (ms)": round(float(seconds.mean()) * 1e3, 3),
            "P90 xfer time (ms)": round(float(np.percentile(seconds, 90)) * 1e3, 3),
            "Avg post time (ms)": round(float(post.mean()) * 1e3, 3),
            "P90 post time (ms)": round(float(np.percentile(post, 90)) * 1e3, 3),
            "Avg MB per transfer": round(float(mib.mean()), 3),
            "Throughput (MB/s)": round(float(mib.sum() / seconds.sum()), 3),
            "Avg number of descriptors": round(float(np.mean(data["num_descriptors"])), 1),
        }
    return line | {f"Num {name.replace('_', ' ')}": data[name] for name in COUNTERS}
