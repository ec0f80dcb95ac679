"""The upstream names that sparse attention and shared prefixes stand on."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use
from penstock.plugins.vllm.flowkv_seams import override, read

_CPU = "vllm.v1.attention.backends.cpu_attn"

_REGISTRY = (
    Seam("vllm.model_executor.models.utils:extract_layer_index", Use.CALL, "(layer_name)"),
    Seam("vllm.v1.attention.backends.registry:register_backend", Use.CALL, "(backend, class_path)"),
    Seam("vllm.v1.attention.backends.registry:AttentionBackendEnum.is_overridden", Use.CALL, "(self)"),
    *read("vllm.v1.attention.backends.registry:AttentionBackendEnum", "CUSTOM"),
    *read("vllm.config.vllm:VllmConfig", "additional_config"),
    Seam("vllm.config.vllm:get_current_vllm_config_or_none", Use.CALL, "()"),
)

CPU_ATTENTION = (
    *override(f"{_CPU}:CPUAttentionBackend", get_name="()", get_impl_cls="()", get_builder_cls="()"),
    *override(
        f"{_CPU}:CPUAttentionMetadataBuilder",
        __init__="(self, kv_cache_spec, layer_names, vllm_config, device)",
        build="(self, common_prefix_len, common_attn_metadata, fast_build=...)",
    ),
    *override(
        f"{_CPU}:CPUAttentionBackendImpl",
        __init__="(self, *args, **kwargs)",
        forward="(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=..., "
        "output_block_scale=...)",
    ),
    *read(f"{_CPU}:CPUAttentionBackend", "get_supported_head_sizes"),
    *read(
        f"{_CPU}:CPUAttentionMetadata",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "seq_lens",
        "block_table",
        "causal",
        "dynamic_causal",
    ),
    *read(f"{_CPU}:CPUAttentionMetadataBuilder", "block_size", "isa"),
    *read("vllm.v1.kv_cache_interface:AttentionSpec", "num_kv_heads", "head_size", "dtype"),
    *read(
        f"{_CPU}:CPUAttentionBackendImpl",
        "scale",
        "head_size",
        "num_queries_per_kv",
        "kv_cache_dtype",
        "attn_type",
        "sliding_window",
        "alibi_slopes",
        "logits_soft_cap",
        "sinks",
        "kv_sharing_target_layer_name",
    ),
    Seam(
        "vllm._custom_ops:cpu_attn_get_scheduler_metadata",
        Use.CALL,
        "(num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, dtype, query_start_loc, causal, "
        "sliding_window_size, isa, enable_kv_split, kv_cache_dtype)",
    ),
    Seam(
        "vllm._custom_ops:cpu_attention_with_kv_cache",
        Use.CALL,
        "(query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, causal, alibi_slopes, "
        "sliding_window, block_table, softcap, scheduler_metadata, s_aux)",
    ),
    Seam(
        "vllm._custom_ops:cpu_attn_reshape_and_cache",
        Use.CALL,
        "(key, value, key_cache, value_cache, slot_mapping, isa)",
    ),
    *_REGISTRY,
)
"""The CPU backend that ours extends, and its kernels."""

STEP_SHAPE = read(f"{_CPU}:CPUAttentionMetadataBuilder", "num_heads", "num_kv_heads")
"""What shared prefixes need to know of a builder's layers besides."""

_BASE = "vllm.v1.attention.backend"
_STOCK = {"flash_attn": "FlashAttention", "triton_attn": "TritonAttention"}

GPU_ATTENTION = (
    *_REGISTRY,
    *override(f"{_BASE}:AttentionBackend", supports_batch_invariance="(cls)"),
    *override(f"{_BASE}:AttentionBackend", supports_kv_cache_dtype="(cls, kv_cache_dtype)"),
    *override(
        f"{_BASE}:AttentionImpl",
        fused_output_quant_supported="(self, quant_key)",
        fused_rope_kvcache_supported="(self)",
    ),
    *override(
        f"{_BASE}:AttentionMetadataBuilder",
        get_cudagraph_support="(cls, vllm_config, kv_cache_spec)",
        get_varlen_cudagraph_max_query_len="(cls, vllm_config, kv_cache_spec)",
        build_for_cudagraph_capture="(self, common_attn_metadata)",
    ),
    *read(f"{_BASE}:AttentionImplBase", "supports_dcp", "supports_pcp"),
    *read(f"{_BASE}:AttentionCGSupport", "UNIFORM_SINGLE_TOKEN_DECODE"),
    *(
        seam
        for module, name in _STOCK.items()
        for seam in (
            *override(
                f"vllm.v1.attention.backends.{module}:{name}Backend",
                get_name="()",
                get_impl_cls="()",
                get_builder_cls="()",
            ),
            *override(
                f"vllm.v1.attention.backends.{module}:{name}MetadataBuilder",
                __init__="(self, kv_cache_spec, layer_names, vllm_config, device)",
                build="(self, common_prefix_len, common_attn_metadata, fast_build=...)",
            ),
            *override(
                f"vllm.v1.attention.backends.{module}:{name}Impl",
                forward="(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=..., "
                "output_block_scale=...)",
                do_kv_cache_update="(self, layer, key, value, kv_cache, slot_mapping)",
            ),
            *read(
                f"vllm.v1.attention.backends.{module}:{name}Metadata",
                "max_query_len",
                "max_seq_len",
                "seq_lens",
                "block_table",
                "causal",
            ),
            *read(
                f"vllm.v1.attention.backends.{module}:{name}Impl",
                "num_kv_heads",
                "num_queries_per_kv",
                "head_size",
                "scale",
            ),
        )
    ),
    *read("vllm.model_executor.layers.attention.attention:Attention", "kv_cache", "kv_cache_torch_dtype"),
    *read("vllm.config.vllm:VllmConfig", "kv_transfer_config"),
    *read("vllm.config.parallel:ParallelConfig", "use_ubatching"),
    *read("vllm.config.cache:CacheConfig", "kv_cache_memory_bytes"),
)
"""The GPU backends that ours extends; they write the cache before attention, by slots."""

BLOCKS = (
    *read("vllm.v1.worker.gpu_worker:Worker", "model_runner"),
    *read("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "kv_cache_config"),
    *read("vllm.v1.kv_cache_interface:KVCacheConfig", "num_blocks", "kv_cache_groups"),
    *read("vllm.v1.core.sched.output:SchedulerOutput", "scheduled_new_reqs", "scheduled_cached_reqs"),
    *read("vllm.v1.core.sched.output:NewRequestData", "block_ids", "num_computed_tokens"),
    *read("vllm.v1.core.sched.output:CachedRequestData", "new_block_ids"),
    Seam("vllm.distributed.kv_transfer.kv_transfer_state:has_kv_transfer_group", Use.CALL, "()"),
)
"""Which blocks a step hands out."""

STATISTICS = (
    *read("vllm.v1.outputs:ModelRunnerOutput", "req_ids"),
    *read("vllm.v1.engine:EngineCoreOutputs", "scheduler_stats"),
    *read("vllm.v1.metrics.stats:SchedulerStats", "kv_connector_stats"),
    Seam("vllm.v1.core.sched.scheduler:Scheduler.get_num_unfinished_requests", Use.CALL, "(self)"),
)
"""How statistics of a worker reach the front end."""
