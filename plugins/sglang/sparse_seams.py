"""The upstream names that sparse attention stands on, by what it does with them."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use
from penstock.plugins.sglang.flowkv_seams import override
from penstock.plugins.sglang.plain_caches import SEAMS as PLAIN_CACHES
from penstock.plugins.sglang.scheduler_seams import read

_REGISTRY = "sglang.srt.layers.attention.attention_registry"
_NATIVE = "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend"
_ALLOCATOR = "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator"
_POOL = "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool"
_RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner"
_BATCH = "sglang.srt.model_executor.forward_batch_info:ForwardBatch"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"

BACKEND = (
    Seam(f"{_REGISTRY}:register_attention_backend", Use.CALL, "(name)"),
    Seam(f"{_REGISTRY}:ATTENTION_BACKENDS", Use.READ),
    *PLAIN_CACHES,
    Seam("sglang.srt.runtime_context:attention_backends", Use.CALL, "()"),
    *override(
        _NATIVE,
        __init__="(self, model_runner)",
        init_forward_metadata="(self, forward_batch)",
        forward_decode="(self, q, k, v, layer, forward_batch, save_kv_cache=...)",
    ),
    *read(_NATIVE, "req_to_token_pool", "token_to_kv_pool"),
    *read(
        _RUNNER,
        "device",
        "model",
        "page_size",
        "token_to_kv_pool",
        "token_to_kv_pool_allocator",
        "use_mla_backend",
    ),
)
"""The backend that ours extends, and how SGLang comes to it: decodes go to ours, all else to its own
(``HybridAttnBackend``)."""

LAYERS = (
    *read(
        "sglang.srt.layers.radix_attention:RadixAttention",
        "attn_type",
        "is_cross_attention",
        "layer_id",
        "logit_cap",
        "qk_head_dim",
        "scaling",
        "sliding_window_size",
        "tp_k_head_num",
        "tp_q_head_num",
        "v_head_dim",
        "xai_temperature_len",
    ),
    *read(_BATCH, "encoder_lens", "forward_mode", "out_cache_loc", "req_pool_indices", "seq_lens"),
    *read("sglang.srt.mem_cache.memory_pool:ReqToTokenPool", "req_to_token"),
    Seam("sglang.srt.mem_cache.memory_pool:KVWriteLoc", Use.READ),
)
"""What is read of layers and of a batch."""

PAGES = (
    Seam(f"{_POOL}.get_key_buffer", Use.CALL, "(self, layer_id)"),
    Seam(f"{_POOL}.get_value_buffer", Use.CALL, "(self, layer_id)"),
    Seam(f"{_POOL}.set_kv_buffer", Use.CALL, "(self, layer, loc_info, cache_k, cache_v)"),
    *read(_POOL, "is_quantized_kv_cache", "kv_cache_layout"),
    Seam(f"{_ALLOCATOR}.alloc", Use.PATCH, "(self, need_size)", wraps=True),
    Seam(
        f"{_ALLOCATOR}.alloc_extend",
        Use.PATCH,
        "(self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, "
        "num_new_pages=...)",
        wraps=True,
    ),
    Seam(f"{_ALLOCATOR}.alloc_decode", Use.PATCH, "(self, seq_lens, seq_lens_cpu, last_loc)", wraps=True),
    Seam("sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator.get_kvcache", Use.CALL, "(self)"),
)
"""The pool, and the one place through which its pages change hands."""

METRICS = (
    Seam(f"{_SCHEDULER}.process_batch_result", Use.PATCH, "(self, batch, result)", wraps=True),
    Seam(f"{_SCHEDULER}.on_idle", Use.PATCH, "(self)", wraps=True),
    *read(_SCHEDULER, "metrics_collector"),
    *read("sglang.srt.observability.metrics_collector:SchedulerMetricsCollector", "labels"),
)
"""Where the scheduler's process publishes."""
