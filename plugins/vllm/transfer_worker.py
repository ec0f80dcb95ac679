"""FlowKV in a vLLM worker: registers its KV cache, pulls what is ordered, hashes what is handed off."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from penstock.connectors.config import FlowKVConfig
from penstock.connectors.control import ControlClient
from penstock.connectors.digest import sampled_positions
from penstock.connectors.messages import Welcome
from penstock.connectors.receiver import Outcome, Receiver
from penstock.connectors.receiver_thread import ReceiverThread
from penstock.connectors.transfer_stats import TransferStatsData
from penstock.connectors.transports.factory import make_transport
from penstock.plugins.cache_digest import digester_of
from penstock.plugins.vllm.record import geometry_of, record_of
from penstock.plugins.vllm.transfer_meta import HandshakeMetadata, StepMetadata, WorkerMetadata

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from penstock.connectors.digest import Digester, Pending
    from penstock.connectors.transports.base import Transport

logger = logging.getLogger(__name__)

UNKNOWN_INSTANCE = "0" * 32


class TransferWorker:
    """Worker half of the connector; every method mirrors a ``KVConnectorBase_V1`` hook."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlowKVConfig, engine_id: str
    ) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        self._engine_id = engine_id
        self._rank = get_tensor_model_parallel_rank()
        self._welcome: Welcome | None = None
        self._digester: Digester | None = None
        self._transport: Transport | None = None
        self._receiver: ReceiverThread | None = None
        self._hashing: dict[str, Pending] = {}
        self._reported = WorkerMetadata()
        self._invalid_blocks: set[int] = set()
        self._stats = TransferStatsData()

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Register the whole allocation with the transport; the engine may serve peers from now on."""
        config = self._config
        geometry = geometry_of(self._kv_cache_config, kv_caches)
        self._digester = digester_of(geometry, next(iter(kv_caches.values())))
        digest = "off" if config.digest == "off" else f"{self._digester.algorithm} {config.digest}"
        record = record_of(self._vllm_config, self._kv_cache_config, geometry, digest)
        transport = self._transport = make_transport(
            config,
            f"{self._engine_id}-{self._rank}",
            serves=self._vllm_config.kv_transfer_config.is_kv_producer,
            reads=self._vllm_config.kv_transfer_config.is_kv_consumer,
        )
        endpoint = transport.register(geometry)
        self._welcome = Welcome(UNKNOWN_INSTANCE, record, geometry, transport.name, endpoint)
        self._receiver = ReceiverThread(
            Receiver(
                rank=self._rank,
                record=record,
                geometry=geometry,
                transport=transport,
                control=ControlClient(config.shared_key, config.handshake_timeout_s),
                digester=self._digester,
                config=config,
                clock=time.monotonic,
            )
        )
        extents = geometry.extents_per_run
        logger.info(
            "FlowKV rank %d: %d blocks of %d KiB over %s, layout %s, %s a run of blocks",
            self._rank,
            geometry.num_blocks,
            geometry.block_bytes // 1024,
            transport.name,
            record.layout,
            "one descriptor" if extents == 1 else f"{extents or 'many'} descriptors",
        )

    def get_handshake_metadata(self) -> HandshakeMetadata | None:
        """What this rank tells receivers."""
        return HandshakeMetadata(self._welcome) if self._welcome else None

    def start_loads(self, step: StepMetadata) -> None:
        """Post this step's loads; nothing waits."""
        for load in step.loads:
            assert self._receiver is not None
            self._receiver.submit(load)

    def digest_prompts(self, step: StepMetadata) -> None:
        """Hash the prompts that this step has completed; called after the forward pass."""
        for request_id, blocks in step.to_digest.items():
            assert self._digester is not None
            positions = sampled_positions(len(blocks), self._config.digest)
            self._hashing[request_id] = self._digester.begin([blocks[i] for i in positions])

    def finished(self, step: StepMetadata) -> tuple[set[str], set[str]]:
        """Requests whose sending, and whose receiving, has ended; failed ones are among the latter."""
        received: set[str] = set()
        for rejected in step.rejected:
            self._fail(rejected.request_id, rejected.target_blocks, rejected.kind, rejected.reason)
            received.add(rejected.request_id)
        for outcome in self._receiver.outcomes() if self._receiver else ():
            self._settle(outcome)
            received.add(outcome.load.request_id)
        return step.finished_sending, received

    def take_invalid_blocks(self) -> set[int]:
        """Blocks of the loads that failed in this step."""
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def take_reported(self) -> WorkerMetadata | None:
        """Digests and failures for the scheduler half."""
        for request_id in [r for r, pending in self._hashing.items() if pending.ready()]:
            digests = self._hashing.pop(request_id).result()
            self._reported.digests[request_id] = {self._rank: digests.astype("<u8").tobytes()}
        if not self._reported.digests and not self._reported.failed:
            return None
        reported, self._reported = self._reported, WorkerMetadata()
        return reported

    def take_stats(self) -> TransferStatsData | None:
        """Observations since the last call."""
        if self._stats.is_empty:
            return None
        stats, self._stats = self._stats, TransferStatsData()
        return stats

    def shutdown(self) -> None:
        """Stop pulling and deregister the memory, unless a transfer may still write to it."""
        if self._receiver and not self._receiver.close():
            logger.error("FlowKV rank %d leaves its KV cache registered", self._rank)
            return
        self._receiver = None
        if self._transport:
            self._transport.close()
            self._transport = None

    def _settle(self, outcome: Outcome) -> None:
        load = outcome.load
        if outcome.error:
            self._fail(load.request_id, load.target_blocks, outcome.error.kind, str(outcome.error))
        elif outcome.stats:
            self._stats.add_transfer(outcome.stats)

    def _fail(self, request_id: str, blocks: tuple[int, ...] | list[int], kind: str, reason: str) -> None:
        logger.error("FlowKV load of request %s failed: %s", request_id, reason)
        self._invalid_blocks.update(blocks)
        self._reported.failed.add(request_id)
        self._stats.add_failure(kind)
