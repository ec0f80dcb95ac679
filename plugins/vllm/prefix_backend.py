"""vLLM's CPU attention with decode steps that read a shared prefix once; everything else is stock's.

A step is shared where each of its requests has one query row, and enough of what they read is the same
blocks. Prompts, drafts and steps beside a prompt are stock's, and so are steps that would save too little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from penstock.kernels.shared_prefix.attention import SharedAttention
from penstock.kernels.shared_prefix.layout import Layout
from penstock.kernels.shared_prefix.planner import PrefixPlanner
from penstock.plugins.configuration import shared_prefix_config
from penstock.plugins.vllm.prefix_worker import PrefixWorker, check
from penstock.plugins.vllm.sparse_worker import dense_reason


class PrefixCPUBackend(CPUAttentionBackend):
    """What ``AttentionBackendEnum.CUSTOM`` stands for on CPUs where shared prefixes are asked for."""

    @staticmethod
    def get_name() -> str:
        """The member of the enum."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The class of a layer's attention."""
        return PrefixCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The class that describes steps."""
        return PrefixCPUBuilder


@dataclass
class PrefixCPUMetadata(CPUAttentionMetadata):
    """Stock's description of a step; ``shared`` is set where prefixes are read once."""

    shared: Layout | None = None


class PrefixCPUBuilder(CPUAttentionMetadataBuilder):
    """Describes steps, and plans what is read once in them, the same for all layers of its group."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        config = shared_prefix_config(vllm_config.additional_config)
        self._worker = PrefixWorker(config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        reasons = {
            name: layer.impl.stock_reason
            for name, layer in layers.items()
            if isinstance(layer.impl, PrefixCPUImpl)
        }
        self._planner: PrefixPlanner | None = None
        if any(reason is None for reason in reasons.values()):
            group = self.num_heads // self.num_kv_heads
            check(kv_cache_spec, self.isa)
            self._worker.warm_up(kv_cache_spec, group)
            self._planner = PrefixPlanner(
                config,
                self._worker.stats,
                block_tokens=self.block_size,
                heads=self.num_kv_heads,
                group=group,
            )
        self._worker.tell_layers(reasons)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PrefixCPUMetadata:
        """As stock does, with what is shared where the step reads that once."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return PrefixCPUMetadata(**vars(stock), shared=self._plan(common_attn_metadata, stock))

    def _plan(self, common: Any, stock: CPUAttentionMetadata) -> Layout | None:
        count = common.num_reqs
        if (
            self._planner is None
            or common.max_query_len != 1
            or common.num_actual_tokens != count
            or stock.causal is not True
            or stock.dynamic_causal is not None
        ):
            return None
        tokens = common.seq_lens[:count].numpy().astype(np.int64)
        if tokens.min(initial=1) < 1:
            # Rows that pad a batch.
            return None
        tables = common.block_table_tensor[:count].numpy()
        found = self._planner.plan(tables, tokens, torch.get_num_threads())
        self._worker.tell_progress()
        return found


class PrefixCPUImpl(CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stock_reason = dense_reason(self)
        self._attention: SharedAttention | None = None
        self._cache_at = 0

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As stock's; a prefix is read once where ``attn_metadata`` says so."""
        shared: Layout | None = None if attn_metadata is None else attn_metadata.shared
        if shared is None or self.stock_reason is not None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if self._attention is None or self._cache_at != kv_cache.data_ptr():
            self._attention = SharedAttention(kv_cache)
            self._cache_at = kv_cache.data_ptr()
        count = shared.requests
        self._attention.attend(query[:count], shared, self.scale, self.num_queries_per_kv, output[:count])
        return output
