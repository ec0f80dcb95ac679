"""Which layers of a model may be sparse over which pool, and what a layer needs for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import attention_backends

from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.paged_decode import PagedDecode
from penstock.kernels.sparse.token_pages import TokenPages
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.sglang import sparse_pages
from penstock.plugins.sglang.sparse_settings import BACKEND, DENSE
from penstock.plugins.sparse_worker import first_reason

LEAST_BYTES = 2
"""Of a number in a cache by whose keys pages are chosen."""

if TYPE_CHECKING:
    from penstock.plugins.sparse_worker import SparseWorker


def require_plain_pool(runner: Any) -> None:
    """Refuse a runner whose keys and values are not what pages are chosen by.

    Raises:
        ConfigurationError: saying what the model or the platform brings, and what is allowed.
    """
    pool, allocator = runner.token_to_kv_pool, runner.token_to_kv_pool_allocator
    prefill, _ = attention_backends()
    plain = (
        isinstance(pool, MHATokenToKVPool)
        and pool.kv_cache_layout == "nhd"
        and not pool.is_quantized_kv_cache
    )
    paged = isinstance(allocator, PagedTokenToKVPoolAllocator)
    refused = first_reason(
        {
            "a model with MLA, allowed: MHA and GQA": runner.use_mla_backend,
            f"the device {runner.device}, allowed: cpu": runner.device != "cpu",
            f"prompts on {prefill}, allowed: {DENSE} (give --prefill-attention-backend {DENSE})": prefill
            != DENSE,
            f"the KV pool {type(pool).__name__}, allowed: MHATokenToKVPool of plain keys in layout nhd (for "
            "models with sliding windows, give --disable-hybrid-swa-memory)": not plain,
            f"a KV cache of {getattr(pool, 'dtype', None)}, allowed: one of 16 or 32 bits": not plain
            or pool.dtype.itemsize < LEAST_BYTES,
            f"the allocator {type(allocator).__name__}, allowed: PagedTokenToKVPoolAllocator": not paged,
        }
    )
    if refused:
        raise ConfigurationError(f"--attention-backend {BACKEND}: given {refused}")


def attention_layers(model: torch.nn.Module) -> dict[int, RadixAttention]:
    """The model's attention layers, by their number."""
    return {layer.layer_id: layer for layer in model.modules() if isinstance(layer, RadixAttention)}


def dense_reason(layer: RadixAttention) -> str | None:
    """Why a layer stays dense in every step, or None."""
    return first_reason(
        {
            f"attention of type {layer.attn_type.value}": layer.attn_type != AttentionType.DECODER,
            "cross attention": layer.is_cross_attention,
            f"a sliding window of {layer.sliding_window_size}": (layer.sliding_window_size or -1) > -1,
            "a soft cap on logits": layer.logit_cap > 0,
            "a temperature by position": layer.xai_temperature_len > 0,
        }
    )


class SparseLayer:
    """Pages of one layer, and what chooses among them."""

    def __init__(self, layer: RadixAttention, pool: MHATokenToKVPool, worker: SparseWorker) -> None:
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        self.pages = TokenPages(keys, values, pool.page_size)
        # Steps may run in inference mode; pages are forgotten between them.
        with torch.inference_mode(False):
            index = BlockIndex(
                blocks=self.pages.blocks,
                heads=layer.tp_k_head_num,
                block_tokens=pool.page_size,
                head_size=layer.qk_head_dim,
                summary_tokens=worker.config.summary_tokens,
                rounds=worker.config.summary_rounds,
                value_size=layer.v_head_dim if worker.config.estimate_rest else 0,
            )
        sparse_pages.register(pool, index)
        self.decode = PagedDecode(
            worker.config, layer.layer_id, index, self.pages, worker.calibration, worker.stats
        )
        worker.tell_index(index.nbytes, _bytes(keys) + _bytes(values))


def _bytes(buffer: torch.Tensor) -> int:
    return buffer.numel() * buffer.element_size()
