"""The upstream names that sparse attention stands on."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use
from penstock.plugins.vllm.flowkv_seams import override, read

_CPU = "vllm.v1.attention.backends.cpu_attn"

ATTENTION = (
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
    Seam("vllm.model_executor.models.utils:extract_layer_index", Use.CALL, "(layer_name)"),
    Seam("vllm.v1.attention.backends.registry:register_backend", Use.CALL, "(backend, class_path)"),
    Seam("vllm.v1.attention.backends.registry:AttentionBackendEnum.is_overridden", Use.CALL, "(self)"),
    *read("vllm.v1.attention.backends.registry:AttentionBackendEnum", "CUSTOM"),
    *read("vllm.config.vllm:VllmConfig", "additional_config"),
)
"""The CPU backend that ours extends, and its kernels."""

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
