"""``FlowKVConnector``: the class that vLLM loads for ``--kv-connector flowkv``. Every hook delegates."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from penstock.connectors.transfer_stats import TransferStatsData
from penstock.plugins.configuration import flowkv_config
from penstock.plugins.vllm.record import require_supported
from penstock.plugins.vllm.transfer_meta import HandshakeMetadata, StepMetadata, WorkerMetadata
from penstock.plugins.vllm.transfer_scheduler import TransferScheduler
from penstock.plugins.vllm.transfer_stats import FlowKVPromMetrics, FlowKVStats
from penstock.plugins.vllm.transfer_worker import TransferWorker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

PREFERRED_LAYOUT = "BLHNC"
"""Block outermost: a run of blocks is one contiguous byte range over all layers."""


def _hit_source() -> Any:
    """Label of external prefix hits; vLLM has it since 0.32."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.P2P


class FlowKVConnector(KVConnectorBase_V1):
    """Prefill-to-decode KV transfer in one or two contiguous pieces a request.

    Not ``SupportsHMA``: vLLM then keeps one KV cache group where the model allows it, and models that need
    several are refused at start-up with the reason.
    """

    _cache_hit_source = _hit_source()

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        # vLLM configures its own logger tree only; hung below it, ours follows the user's settings.
        logging.getLogger("penstock").parent = logging.getLogger("vllm")
        require_supported(vllm_config, kv_cache_config)
        transfer_config = vllm_config.kv_transfer_config
        config = flowkv_config(vllm_config.additional_config, transfer_config.kv_connector_extra_config)
        engine_id = str(transfer_config.engine_id)
        self._scheduler: TransferScheduler | None = None
        self._worker: TransferWorker | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = TransferScheduler(vllm_config, kv_cache_config, config, engine_id)
        else:
            self._worker = TransferWorker(vllm_config, kv_cache_config, config, engine_id)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:  # noqa: ARG003
        """Prefer a block-outermost layout; vLLM keeps its own where the backend has none."""
        return PREFERRED_LAYOUT

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Rebuild statistics that crossed a process."""
        return FlowKVStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """FlowKV's Prometheus series."""
        return FlowKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def scheduler(self) -> TransferScheduler:
        """The scheduler half."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> TransferWorker:
        """The worker half."""
        assert self._worker is not None
        return self._worker

    @property
    def step(self) -> StepMetadata:
        """The orders of the step under way."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata

    # Scheduler half

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.bind_kv_cache_manager(kv_cache_manager)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return tuple(self._kv_cache_config.transfer_group_ids)

    def on_new_request(self, request: Request) -> None:
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self.scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler.update_connector_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler.request_finished(request, block_ids)

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        ranks = {rank: meta for rank, meta in metadata.items() if isinstance(meta, HandshakeMetadata)}
        self.scheduler.set_xfer_handshake_metadata(ranks)

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self.worker.get_handshake_metadata()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self.worker.start_loads(self.step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are whole requests; none is awaited inside a forward pass."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Receivers pull; nothing is saved layer by layer."""

    def wait_for_save(self) -> None:
        self.worker.digest_prompts(self.step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self.worker.finished(self.step)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.take_invalid_blocks()

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        return self.worker.take_reported()

    # Both

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        half = self._scheduler or self._worker
        stats: TransferStatsData | None = half.take_stats() if half else None
        return FlowKVStats(stats.as_dict()) if stats else None

    def shutdown(self) -> None:
        if half := self._scheduler or self._worker:
            half.shutdown()
