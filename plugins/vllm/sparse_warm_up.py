"""Compiles the kernels of sparse attention at start-up, so that no request waits for a compiler."""

from __future__ import annotations

import time
from typing import Any

import torch

from penstock.kernels.sparse.head_rows import head_rows
from penstock.kernels.sparse.packed_attention import rests
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.warm_up import choose_once, warm_up_pages
from penstock.plugins.vllm.packed_keys import PackedKeys, own_attention


def warm_up(config: ServingConfig, spec: Any, isa: str) -> float:
    """Choose once among pages of zeros, as steps will, and read them; returns the seconds it took.

    ``spec`` is vLLM's ``AttentionSpec`` of the layers, ``isa`` the kernels that write their cache.
    """
    began = time.perf_counter()
    heads, page_tokens, size = spec.num_kv_heads, spec.block_size, spec.head_size
    pages = warm_up_pages(config, page_tokens)
    cache = torch.zeros(pages, heads, page_tokens, 2 * size, dtype=spec.dtype)
    attention = own_attention(cache, isa)
    values = size if attention is not None and config.estimate_rest else 0
    read = choose_once(config, PackedKeys(cache, isa), torch.zeros(heads, 1, size), page_tokens, values)
    rows = head_rows([read], heads, page_tokens, heads)
    if attention is not None:
        query = torch.zeros(heads, 1, size, dtype=spec.dtype)
        rest = rests([read], [1], heads, 1, size)
        starts = torch.arange(heads + 1, dtype=torch.int32)
        attention.attend(query, rows, starts, 1.0, torch.empty_like(query), rest)
    return time.perf_counter() - began
