"""Compiles what a decode step calls at start-up, so that no request waits for a compiler."""

from __future__ import annotations

import msgspec
import torch

from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.head_rows import Read
from penstock.kernels.sparse.paged_decode import PagedDecode
from penstock.kernels.sparse.paged_keys import Keys
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.serving_stats import ServingStats


def warm_up_pages(config: ServingConfig, page_tokens: int) -> int:
    """How many pages of zeros ``choose_once`` needs, so that some are free to be chosen."""
    return 2 + config.recent_tokens // page_tokens


def choose_once(
    config: ServingConfig, keys: Keys, query: torch.Tensor, page_tokens: int, value_size: int
) -> Read:
    """Choose once among ``warm_up_pages`` of finite ``keys``, as steps will, for ``query`` float32
    [H, G, D]; what a step would read then. ``value_size`` is the index's."""
    heads, _, size = query.shape
    pages = warm_up_pages(config, page_tokens)
    index = BlockIndex(
        blocks=pages,
        heads=heads,
        block_tokens=page_tokens,
        head_size=size,
        summary_tokens=config.summary_tokens,
        rounds=config.summary_rounds,
        value_size=value_size,
    )
    active = msgspec.structs.replace(
        config, mass=0.5, least_tokens=0, dense_layers=0, most_share=1.0, calibration_share=1.0
    )
    decode = PagedDecode(active, 0, index, keys, Calibration(active.core()), ServingStats())
    blocks = torch.arange(pages)
    return decode.read(query, blocks, pages * page_tokens, page_tokens)
