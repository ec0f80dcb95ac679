"""Reads FlowKV's geometry and compatibility record off a running vLLM worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm
import xxhash
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backend
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from penstock.connectors.compat import CompatibilityRecord
from penstock.connectors.errors import IncompatibleError
from penstock.connectors.geometry import CacheGeometry, LayerPages, strips_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


def require_supported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse what FlowKV cannot move, naming the setting.

    Raises:
        IncompatibleError: hybrid models, pipeline or context parallelism.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise IncompatibleError(
            f"FlowKV moves models with one KV cache group; this one has {len(groups)} ({kinds}). "
            "Add --disable-hybrid-kv-cache-manager if the model allows it"
        )
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) != 1:
            raise IncompatibleError(f"FlowKV supports {name}=1; it is {size}")


def block_size_of(kv_cache_config: KVCacheConfig) -> int:
    """Tokens a block of the only KV cache group."""
    return int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)


def geometry_of(kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor]) -> CacheGeometry:
    """Where the worker's KV blocks lie, from ``KVCacheTensor`` strides, checked against the layers' views.

    Raises:
        IncompatibleError: a layer's view is not where the strides say.
    """
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    first = next(iter(kv_caches.values()))
    base = first.untyped_storage().data_ptr()
    pages: list[LayerPages] = []
    for tensor in kv_cache_config.kv_cache_tensors:
        for index, layer in enumerate(tensor.layers):
            expected = base + tensor.offset + index * tensor.layer_stride
            if layer in kv_caches and kv_caches[layer].data_ptr() != expected:
                found = kv_caches[layer].data_ptr() - base
                raise IncompatibleError(f"layer {layer} lies at byte {found}, not at {expected - base}")
        pages.append(
            LayerPages(
                num_layers=len(tensor.layers),
                layer_stride=tensor.layer_stride,
                block_stride=tensor.block_stride,
                page_bytes=_page_bytes(spec, tensor.layers[0]),
                offset=tensor.offset,
            )
        )
    return CacheGeometry(
        base_address=base,
        size=kv_cache_config.kv_cache_tensors[0].size,
        num_blocks=kv_cache_config.num_blocks,
        strips=strips_of(pages),
        memory="DRAM" if first.device.type == "cpu" else "VRAM",
        device=first.device.index or 0,
    )


def record_of(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, geometry: CacheGeometry, digest: str
) -> CompatibilityRecord:
    """What a peer must match, from the engine's resolved configuration."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return CompatibilityRecord(
        engine="vllm " + ".".join(vllm.__version__.split(".")[:2]),
        model=str(model.model),
        cache_dtype=f"{cache.cache_dtype} of {model.dtype}",
        block_size=block_size_of(kv_cache_config),
        tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
        num_layers=sum(len(tensor.layers) for tensor in kv_cache_config.kv_cache_tensors),
        num_kv_heads=model.get_num_kv_heads(vllm_config.parallel_config),
        head_size=model.get_head_size(),
        layout=str(kv_cache_config.kv_cache_layout or cache.kv_cache_layout),
        attention_backend=get_current_attn_backend(vllm_config).get_name(),
        packing=_packing(vllm_config, kv_cache_config),
        layer_order=_layer_order(kv_cache_config),
        strip_widths=tuple(strip.width for strip in geometry.strips),
        digest=digest,
    )


def _layer_order(kv_cache_config: KVCacheConfig) -> str:
    placed = [
        (tensor.offset + index * tensor.layer_stride, layer)
        for tensor in kv_cache_config.kv_cache_tensors
        for index, layer in enumerate(tensor.layers)
    ]
    return xxhash.xxh3_64_hexdigest("\n".join(layer for _, layer in sorted(placed)).encode())


def _page_bytes(spec: KVCacheSpec, layer: str) -> int:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = spec.kv_cache_specs[layer]
    return int(spec.page_size_bytes)


def _packing(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """The CPU kernels store K as their instruction set likes it; every other backend as the layout says."""
    if not current_platform.is_cpu():
        return "logical"
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model = vllm_config.model_config
    isa = _get_attn_isa(model.dtype, block_size_of(kv_cache_config), model.get_head_size())
    return f"cpu {isa}"
