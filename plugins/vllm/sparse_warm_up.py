"""Compiles the kernels of sparse attention at start-up, so that no request waits for a compiler."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import torch

from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.head_rows import Read, head_rows
from penstock.kernels.sparse.paged_decode import PagedDecode
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.serving_stats import ServingStats
from penstock.plugins.vllm.packed_keys import PackedKeys


def warm_up(config: ServingConfig, spec: Any, isa: str) -> float:
    """Choose once among pages of zeros, as steps will; returns the seconds it took.

    ``spec`` is vLLM's ``AttentionSpec`` of the layers, ``isa`` the kernels that write their cache.
    """
    began = time.perf_counter()
    heads, page_tokens, size = spec.num_kv_heads, spec.block_size, spec.head_size
    pages = 2 + config.recent_tokens // page_tokens
    index = BlockIndex(
        blocks=pages,
        heads=heads,
        block_tokens=page_tokens,
        head_size=size,
        summary_tokens=config.summary_tokens,
        rounds=config.summary_rounds,
    )
    keys = PackedKeys(torch.zeros(pages, heads, page_tokens, 2 * size, dtype=spec.dtype), isa)
    active = msgspec.structs.replace(
        config, mass=0.5, least_tokens=0, dense_layers=0, most_share=1.0, calibration_share=1.0
    )
    decode = PagedDecode(active, 0, index, keys, Calibration(active.core()), ServingStats())
    blocks = torch.arange(pages)
    chosen = decode.pages(torch.zeros(heads, 1, size), blocks, pages * page_tokens, page_tokens)
    head_rows([Read(blocks, chosen, page_tokens)], heads, page_tokens, heads)
    return time.perf_counter() - began
