"""What FlowKV's two halves inside one vLLM engine tell each other, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from penstock.connectors.messages import Welcome
from penstock.connectors.receiver import Load


@dataclass(slots=True, frozen=True)
class RejectedLoad:
    """A load that cannot start: its target blocks are reported as failed in the next step."""

    request_id: str
    target_blocks: tuple[int, ...]
    reason: str
    kind: str


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to workers."""

    loads: list[Load] = field(default_factory=list)
    rejected: list[RejectedLoad] = field(default_factory=list)
    finished_sending: set[str] = field(default_factory=set)
    to_digest: dict[str, list[int]] = field(default_factory=dict)
    """Block ids to hash, by the request that is handed off, in token order."""


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """Workers to scheduler."""

    digests: dict[str, dict[int, bytes]] = field(default_factory=dict)
    """Little-endian uint64 digests by request and rank."""
    failed: set[str] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        """Merge what another rank reports for the same step."""
        assert isinstance(other, WorkerMetadata)
        for request_id, by_rank in other.digests.items():
            self.digests.setdefault(request_id, {}).update(by_rank)
        self.failed |= other.failed
        return self


@dataclass
class HandshakeMetadata(KVConnectorHandshakeMetadata):
    """A worker's half of the welcome that receivers get."""

    welcome: Welcome
