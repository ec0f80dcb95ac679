"""The upstream names that FlowKV stands on, by what it does with them."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use

_FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory"
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
_QUEUE = "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue"
_BLOCK = "vllm.v1.core.kv_cache_utils:KVCacheBlock"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"


def override(owner: str, **methods: str) -> tuple[Seam, ...]:
    """Methods of ``owner`` that upstream calls and we provide."""
    return tuple(Seam(f"{owner}.{name}", Use.OVERRIDE, signature) for name, signature in methods.items())


def read(owner: str, *names: str) -> tuple[Seam, ...]:
    """Attributes of ``owner`` that we read."""
    return tuple(Seam(f"{owner}.{name}", Use.READ) for name in names)


REGISTRY = (
    Seam(f"{_FACTORY}.register_connector", Use.CALL, "(cls, name, module_path, class_name)"),
    Seam(f"{_FACTORY}._registry", Use.READ),
)
"""What it takes to make a connector's name known."""

CONNECTOR = (
    *override(
        _CONNECTOR,
        __init__="(self, vllm_config, role, kv_cache_config)",
        get_required_kvcache_layout="(cls, vllm_config)",
        bind_kv_cache_manager="(self, kv_cache_manager)",
        on_new_request="(self, request)",
        get_num_new_matched_tokens="(self, request, num_computed_tokens)",
        update_state_after_alloc="(self, request, blocks, num_external_tokens)",
        build_connector_meta="(self, scheduler_output)",
        update_connector_output="(self, connector_output)",
        request_finished="(self, request, block_ids)",
        get_handshake_metadata="(self)",
        set_xfer_handshake_metadata="(self, metadata)",
        register_kv_caches="(self, kv_caches)",
        start_load_kv="(self, forward_context, **kwargs)",
        wait_for_layer_load="(self, layer_name)",
        save_kv_layer="(self, layer_name, kv_layer, attn_metadata, **kwargs)",
        wait_for_save="(self)",
        get_finished="(self, finished_req_ids)",
        get_block_ids_with_load_errors="(self)",
        build_connector_worker_meta="(self)",
        get_kv_connector_stats="(self)",
        build_kv_connector_stats="(cls, data=...)",
        build_prom_metrics="(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues)",
        shutdown="(self)",
    ),
    Seam(
        f"{_CONNECTOR}.get_loaded_kv_cache_group_ids",
        Use.OVERRIDE,
        "(self, request)",
        optional=True,
    ),
    *read(
        "vllm.v1.request:Request",
        "request_id",
        "status",
        "kv_transfer_params",
        "prompt_token_ids",
        "num_prompt_tokens",
        "num_computed_tokens",
        "max_tokens",
        "cache_salt",
        "lora_request",
        "mm_features",
    ),
)
"""The hooks that vLLM calls, and what they read of a request."""

ALLOCATION = (
    *read("vllm.v1.core.kv_cache_manager:KVCacheManager", "block_pool", "coordinator"),
    *read("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator", "single_type_managers"),
    *read("vllm.v1.core.block_pool:BlockPool", "blocks", "free_block_queue"),
    *override("vllm.v1.core.block_pool:BlockPool", get_new_blocks="(self, num_blocks)"),
    *override(
        _QUEUE,
        popleft="(self)",
        popleft_n="(self, n)",
        remove="(self, block)",
        append="(self, block)",
        append_n="(self, blocks)",
        prepend_n="(self, blocks)",
    ),
    Seam(f"{_QUEUE}.get_all_free_blocks", Use.CALL, "(self)"),
    *read(_QUEUE, "num_free_blocks"),
    *read(_BLOCK, "block_id", "block_hash", "prev_free_block", "next_free_block"),
    *override(
        _MANAGER,
        allocate_new_blocks="(self, request_id, *args, **kwargs)",
        allocate_external_computed_blocks="(self, request_id, *args, **kwargs)",
        pop_blocks_for_free="(self, request_id)",
    ),
    *read(_MANAGER, "req_to_blocks"),
)
"""The free list that the run allocator chooses from, and the calls that say for whom it chooses."""

GEOMETRY = (
    *read("vllm.v1.kv_cache_layout:KVCacheLayout", "BLHNC"),
    *read(
        "vllm.v1.kv_cache_interface:KVCacheTensor",
        "size",
        "layers",
        "layer_stride",
        "block_stride",
        "offset",
    ),
    *read(
        "vllm.v1.kv_cache_interface:KVCacheConfig",
        "num_blocks",
        "kv_cache_groups",
        "kv_cache_tensors",
        "kv_cache_layout",
    ),
    Seam(
        "vllm.distributed.kv_transfer.kv_connector.utils:get_current_attn_backend",
        Use.CALL,
        "(vllm_config)",
    ),
)
"""Where the bytes of a block lie."""
