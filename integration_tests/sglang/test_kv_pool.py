"""SGLang's KV pool in one allocation: the same tensors to SGLang, pages that move whole, in either layout."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from penstock.connectors.geometry import plan_moves
from penstock.connectors.runs import join_runs, runs_of
from penstock.connectors.transports.base import State
from penstock.connectors.transports.loopback import LoopbackTransport
from penstock.plugins.sglang import kv_pool
from penstock.plugins.sglang.kv_pool import RegionPool, pool_at

PAGE, PAGES, LAYERS, HEADS = 4, 12, 3, 2
DESCRIPTORS = {"tokens": 1, "layers": 2 * LAYERS}


@pytest.fixture(params=["tokens", "layers"])
def layout(request, monkeypatch) -> str:
    monkeypatch.setattr(kv_pool, "wanted_layout", lambda: request.param)
    return str(request.param)


def make(kind: type, value_size: int = 8, odd: int = 0) -> MHATokenToKVPool:
    return kind(
        size=PAGE * PAGES + odd,
        page_size=PAGE,
        dtype=torch.float16,
        head_num=HEADS,
        head_dim=8,
        v_head_dim=value_size,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


def fill(pool: MHATokenToKVPool, seed: int) -> list[torch.Tensor]:
    """Random contents; copies of all buffers."""
    draw = torch.Generator().manual_seed(seed)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.copy_(torch.rand(buffer.shape, generator=draw))
    return [buffer.clone() for buffer in (*pool.k_buffer, *pool.v_buffer)]


@pytest.mark.parametrize("value_size", [8, 5])
@pytest.mark.parametrize("odd", [0, 3])
def test_its_tensors_are_stock_s_and_lie_apart(layout: str, value_size: int, odd: int):
    ours, stock = make(RegionPool, value_size, odd), make(MHATokenToKVPool, value_size, odd)
    for mine, its in zip((*ours.k_buffer, *ours.v_buffer), (*stock.k_buffer, *stock.v_buffer), strict=True):
        assert mine.shape == its.shape
        assert mine.dtype == its.dtype
    kept = fill(ours, 1)
    for buffer, copy in zip((*ours.k_buffer, *ours.v_buffer), kept, strict=True):
        assert torch.equal(buffer, copy)
    assert pool_at(ours.get_contiguous_buf_infos()[0][0]) is ours


@pytest.mark.parametrize("value_size", [8, 5])
def test_pages_move_whole_and_nothing_else_does(layout: str, value_size: int):
    source, target = make(RegionPool, value_size), make(RegionPool, value_size)
    wanted, kept = fill(source, 1), fill(target, 2)
    pages = [3, 4, 5, 9], [7, 8, 9, 2]
    network = {}
    LoopbackTransport("source", network).register(source.geometry())
    reader = LoopbackTransport("target", network)
    reader.register(target.geometry())
    joint = join_runs(runs_of(pages[0]), runs_of(pages[1]))
    moves = plan_moves(source.geometry(), target.geometry(), joint)
    assert len(moves) == 2 * DESCRIPTORS[layout]
    assert reader.read("source", moves).poll() is State.DONE
    rows = [torch.cat([torch.arange(PAGE) + PAGE * page for page in side]) for side in pages]
    for buffer, theirs, mine in zip((*target.k_buffer, *target.v_buffer), wanted, kept, strict=True):
        expected = mine.clone()
        expected[rows[1]] = theirs[rows[0]]
        assert torch.equal(buffer, expected)
