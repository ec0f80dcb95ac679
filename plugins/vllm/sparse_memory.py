"""What of a GPU's memory the KV cache gets beside the index of sparse attention."""

from __future__ import annotations

from typing import Any


def left_for_cache(worker: Any, available: int) -> int:
    """``available`` bytes without what the index of a cache of the rest takes, and the memory of a step.

    A cache whose size the user names (``--kv-cache-memory-bytes``) stays as it is: the index comes on top.
    """
    # Not before a worker asks: the list of features is read where torch need not be.
    import torch
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from penstock.kernels.triton.cache import PagedCache
    from penstock.kernels.triton.layers import plan, summary_bytes
    from penstock.plugins.vllm.sparse_gpu import gpu_config, processors_of, sparse_layers, step_shape

    settings = worker.vllm_config
    if settings.cache_config.kv_cache_memory_bytes:
        return available
    config = gpu_config(settings)
    layers = sparse_layers(config, get_layers_from_vllm_config(settings, Attention))
    if not layers:
        return available
    layer, tokens = next(iter(layers.values())), settings.cache_config.block_size
    pages = -(-settings.model_config.max_model_len // tokens)
    shape = step_shape(layer, settings.scheduler_config.max_num_seqs, pages)
    block = torch.empty(
        1, tokens, shape.heads, shape.head_size, dtype=layer.kv_cache_torch_dtype, device="meta"
    )
    cache = PagedCache(block, block)
    step = plan(config, shape, cache, processors_of(worker.device)).nbytes
    # Of the layers that have one: an upper bound, whatever else blocks hold.
    share = summary_bytes(config, cache) / (2 * block.nbytes)
    return max(0, int((available - step) / (1 + share)))
