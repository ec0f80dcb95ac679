"""Sparse decode on SGLang's own pool, allocator and layers, beside SGLang's own decode."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_sparse_rig import CONFIG, LEAST, PAGE, PAGES, Rig, all_pages, hook, ids, layer, make_pool

from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.sglang import sparse_layers
from penstock.plugins.sglang.kv_pool import RegionPool


@pytest.fixture(autouse=True)
def hooked(monkeypatch) -> None:
    hook(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [MHATokenToKVPool, RegionPool])
def test_all_pages_give_what_stock_gives_and_what_others_hold_is_never_read(pool, dtype):
    rig = all_pages(pool=pool, dtype=dtype)
    requests = [rig.extend(ids(), tokens) for tokens in (70, 41, 68)]
    mine, stocks = rig.decode_pass(*requests)
    assert rig.backend.worker.stats.selections == len(requests)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(mine, stocks, **close)
    assert mine.dtype == dtype


def test_chosen_pages_alone_are_read():
    rig = Rig()
    slots = rig.extend(ids(), 150)
    # Half of the pages weigh nothing.
    for buffer in rig.pool.k_buffer:
        buffer[slots[40:120]] = 0.0
        buffer[slots[:40]] *= 3
    rig.decode_pass(slots)
    (of,) = rig.backend.worker.stats.snapshot().layer_pages.values()
    assert of[0] < of[1]
    decode = rig.sparse().decode
    chosen = []
    original = decode.choose
    decode.choose = lambda *args: chosen.append(original(*args)) or chosen[-1]
    mine, stocks = rig.decode_pass(slots)
    assert not torch.allclose(mine, stocks)
    pages = chosen[0].pages
    assert not pages.all()
    keys, values = (buffer[slots].transpose(0, 1) for buffer in (rig.pool.k_buffer[2], rig.pool.v_buffer[2]))
    unread = ~pages.repeat_interleave(PAGE, 1)[:, : len(slots)]
    for number, buffer in enumerate((rig.pool.k_buffer[2], rig.pool.v_buffer[2])):
        rows = (keys, values)[number].masked_fill(unread[:, :, None], math.nan)
        buffer[slots] = rows.transpose(0, 1)
    decode.choose = lambda *_: chosen[0]
    again, _ = rig.decode_pass(slots)
    assert again.isfinite().all()


def test_a_request_below_the_activation_length_is_stock_s_to_the_bit_beside_a_long_one():
    rig = all_pages()
    requests = [rig.extend(ids(), tokens) for tokens in (LEAST - 1, 90, 7)]
    mine, stocks = rig.decode_pass(*requests)
    assert torch.equal(mine[[0, 2]], stocks[[0, 2]])
    assert rig.backend.worker.stats.snapshot().dense == {"short context": 2}
    short, stocks = rig.decode_pass(requests[0], requests[2])
    assert torch.equal(short, stocks)
    assert rig.backend.worker.stats.snapshot().dense == {"short context": 2}, (
        "a pass of short ones is stock's"
    )


@pytest.mark.parametrize("compiled", [True, False])
def test_where_nothing_is_saved_our_kernel_reads_every_page_if_it_is_compiled(monkeypatch, compiled):
    rig = Rig(config=msgspec.structs.replace(CONFIG, mass=1.0))
    assert rig.sparse().pages.is_compiled
    if not compiled:
        monkeypatch.setattr(rig.sparse().pages, "_rows", None)
    requests = [rig.extend(ids(), tokens) for tokens in (90, LEAST - 1, 71)]
    mine, stocks = rig.decode_pass(*requests)
    assert rig.backend.worker.stats.snapshot().dense == {"short context": 1, "nothing saved": 2}
    torch.testing.assert_close(mine, stocks, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine[1], stocks[1])
    assert torch.equal(mine[[0, 2]], stocks[[0, 2]]) is not compiled


def test_passes_that_are_not_decodes_and_first_layers_are_stock_s():
    rig = all_pages()
    slots = rig.extend(ids(), 90)
    mine, stocks = rig.decode_pass(slots, sparse=0)
    assert torch.equal(mine, stocks)
    now = rig.backend.worker.stats.snapshot()
    assert (now.selections, now.dense) == (0, {}), "a layer that is never sparse is not asked"
    rig.backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.EXTEND))
    assert rig.backend._step is None


def test_layers_that_are_not_plain_attention_stay_dense_and_are_named(caplog):
    caplog.set_level("WARNING", "sglang.penstock")
    odd = {
        "sliding_window_size": 128,
        "logit_cap": 30.0,
        "attn_type": AttentionType.ENCODER_ONLY,
        "is_cross_attention": True,
    }
    layers = [layer(1), *(layer(2, **{name: value}) for name, value in odd.items())]
    reasons = [sparse_layers.dense_reason(each) for each in layers]
    assert reasons[0] is None
    assert all(reasons[1:])
    Rig(layers=[layer(0), layer(1), layer(2, sliding_window_size=128)])
    assert "leaves 1 layers dense: layer 2: a sliding window of 128" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_mla_backend": True}, "a model with MLA, allowed: MHA and GQA"),
        ({"device": "cuda"}, "the device cuda, allowed: cpu"),
        ({"token_to_kv_pool": SimpleNamespace()}, "the KV pool SimpleNamespace, allowed: MHATokenToKVPool"),
        (
            {"token_to_kv_pool_allocator": TokenToKVPoolAllocator(8, torch.float32, "cpu", None, False)},
            "the allocator TokenToKVPoolAllocator, allowed: Paged",
        ),
    ],
)
def test_what_no_layer_can_be_sparse_with_is_refused(change, message):
    pool = make_pool(MHATokenToKVPool)
    allocator = PagedTokenToKVPoolAllocator(PAGE * PAGES, PAGE, torch.float32, "cpu", pool, True)
    plain = {
        "device": "cpu",
        "token_to_kv_pool": pool,
        "token_to_kv_pool_allocator": allocator,
        "use_mla_backend": False,
    }
    sparse_layers.require_plain_pool(SimpleNamespace(**plain))
    with pytest.raises(ConfigurationError, match=message):
        sparse_layers.require_plain_pool(SimpleNamespace(**{**plain, **change}))


def test_prompts_on_another_backend_are_refused(monkeypatch):
    monkeypatch.setattr(sparse_layers, "attention_backends", lambda: ("triton", "tactic"))
    with pytest.raises(ConfigurationError, match="prompts on triton, allowed: torch_native"):
        Rig()


def test_a_cache_of_eight_bits_is_refused_whoever_asked_for_it():
    with pytest.raises(ConfigurationError, match=r"of torch\.float8_e5m2, allowed: one of 16 or 32 bits"):
        Rig(dtype=torch.float8_e5m2)


def test_threads_share_the_heads_of_a_request(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    rig = all_pages()
    attend = rig.sparse().pages.attend
    calls = []
    monkeypatch.setattr(rig.sparse().pages, "attend", partial(_counted, calls, attend))
    mine, stocks = rig.decode_pass(rig.extend(ids(), 77))
    torch.testing.assert_close(mine, stocks, rtol=1e-5, atol=1e-5)
    assert calls == [1]


def _counted(calls: list[int], attend: Any, queries: torch.Tensor, reads: Any) -> Any:
    calls.append(len(reads))
    return attend(queries, reads)
