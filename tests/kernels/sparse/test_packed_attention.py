"""Attention over chosen blocks of vLLM's CPU layout against torch, over odd shapes, and what stands for the
rest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from penstock.kernels.sparse import block_index, packed_attention
from penstock.kernels.sparse.attention import Partial, attend, merge
from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.head_rows import HeadRows, Read
from penstock.kernels.sparse.packed_attention import PackedAttention, attend_in_torch, rests

CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
SEEDS = st.integers(0, 10_000)


class Pool:
    """A cache [B, H, N, 2 * D] of NaN, but for the tokens of ``lengths``, rows of one head each."""

    def __init__(self, lengths, *, counts=None, tokens=32, group=4, size=32, dtype=torch.float32, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.counts = counts or [1] * len(lengths)
        need = [-(-length // tokens) for length in lengths]
        blocks, heads = sum(need) + 3, 3
        # Another layer's blocks lie between ours.
        self.cache = torch.full((blocks, 2, heads, tokens, 2 * size), math.nan, dtype=dtype)[:, 1]
        self.keys, self.values = (
            torch.full((blocks * 2 * heads, tokens, size), math.nan, dtype=dtype) for _ in range(2)
        )
        numbers = torch.randperm(blocks * heads, generator=random)[: sum(need)]
        table = torch.zeros(len(lengths), max(need), dtype=torch.int32)
        for row, (own, length) in enumerate(zip(numbers.split(need), lengths, strict=True)):
            left = length
            for page, number in enumerate(own.tolist()):
                block, head = number // heads, number % heads
                place = block * 2 * heads + head
                held, left = min(left, tokens), left - tokens
                drawn = [torch.randn(held, size, generator=random).to(dtype) for _ in range(2)]
                self.keys[place, :held], self.values[place, :held] = drawn
                flat = self.cache[block, head].view(-1)
                flat[: size * tokens].view(size, tokens)[:, :held] = drawn[0].T
                flat[size * tokens :].view(tokens, size)[:held] = drawn[1]
                table[row, page] = place
        self.rows = HeadRows(table, torch.tensor(lengths, dtype=torch.int32))
        self.starts = torch.tensor([0, *self.counts]).cumsum(0).int()
        self.query = (2 * torch.randn(sum(self.counts), group, size, generator=random)).to(dtype)
        self.scale = size**-0.5

    def ours(self, rest=None):
        output = torch.full_like(self.query, math.nan)
        attention = PackedAttention(self.cache)
        attention.attend(self.query, self.rows, self.starts, self.scale, output, rest)
        return output

    def expected(self):
        query = self.query.float() * self.scale
        return attend_in_torch(query, self.keys, self.values, self.rows, self.starts)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 200)), min_size=1, max_size=5),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([1, 2, 4, 7, 9]),
    st.sampled_from([16, 48, 64, 128]),
    st.sampled_from(list(CLOSE)),
    st.sampled_from([1, 2, 5]),
    SEEDS,
)
def test_rows_read_their_own_tokens_and_queries_what_is_before_them(
    rows, tokens, group, size, dtype, threads, seed
):
    counts, more = zip(*rows, strict=True)
    lengths = [count + extra for count, extra in rows]
    pool = Pool(
        lengths,
        counts=list(counts),
        tokens=tokens,
        group=group,
        size=size,
        dtype=dtype,
        seed=seed + sum(more),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention.torch, "get_num_threads", lambda: threads)
        found = pool.ours()
    torch.testing.assert_close(found.float(), pool.expected().output, **CLOSE[dtype])


def test_a_rest_is_merged_by_what_it_weighs():
    pool = Pool([70, 33])
    rest = Partial(
        torch.randn(2, 4, 32), torch.tensor([[1.0, 9.0, -math.inf, 4.0]]).expand(2, -1).contiguous()
    )
    expected = merge(pool.expected(), rest).output
    torch.testing.assert_close(pool.ours(rest), expected, **CLOSE[torch.float32])


def test_a_value_that_is_not_finite_shows():
    pool = Pool([70, 70])
    number = int(pool.rows.table[1, 1])
    pool.cache.as_strided((12, 32 * 64), (32 * 64, 1), 0)
    flat = pool.cache[number // 6, number % 6].view(-1)
    flat[32 * 32 :].view(32, 32)[3, 5] = math.nan
    broken = pool.ours().isnan()
    assert broken[1, :, 5].all()
    assert broken.sum() == 4


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1, 32, 2 * 40), torch.float32),
        ((2, 1, 16, 64), torch.float32),
        ((2, 1, 32, 64), torch.float16),
    ],
)
def test_what_compiled_kernels_do_not_read_is_left_to_others(shape, dtype):
    assert not PackedAttention.reads(torch.zeros(shape, dtype=dtype))
    assert PackedAttention.reads(torch.zeros(2, 1, 32, 64))
    assert not PackedAttention.reads(torch.zeros(2, 1, 64, 64)[:, :, ::2])


def test_rests_of_a_batch_are_by_request_then_head_then_row():
    one = Partial(torch.arange(2 * 6 * 5.0).view(2, 6, 5), torch.arange(12.0).view(2, 6))
    reads = [Read(torch.arange(3), None, 4), Read(torch.arange(3), None, 4, one)]
    assert rests(reads[:1], [1], 2, 3, 5) is None
    found = rests(reads, [1, 2], 2, 3, 5)
    assert found.output.shape == (6, 3, 5)
    assert (found.lse[:2] == -math.inf).all()
    assert torch.equal(found.output[2:].view(2, 2, 3, 5)[1, 1], one.output[1, 3:])
    assert torch.equal(found.lse[2:].view(2, 2, 3)[0, 1], one.lse[0, 3:])


def indexed(pages, *, heads=2, width=20, seed=0, rounds=1):
    random = torch.Generator().manual_seed(seed)
    index = BlockIndex(
        blocks=pages + 3,
        heads=heads,
        block_tokens=8,
        head_size=16,
        summary_tokens=2,
        rounds=rounds,
        value_size=width,
    )
    blocks = torch.randperm(pages + 3, generator=random)[:pages]
    keys = torch.randn(heads, pages, 8, 16, generator=random)
    values = torch.randn(heads, pages, 8, width, generator=random)
    index.put(blocks, keys, values)
    return index, blocks, values, random


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([1, 3, 4, 9]), st.sampled_from([1, 20, 64]), st.integers(1, 70), SEEDS
)
def test_what_is_not_read_is_taken_for_the_means_of_its_values(heads, group, width, pages, seed):
    index, blocks, values, random = indexed(pages, heads=heads, width=width, seed=seed)
    # A last page that has no summary yet.
    logs = 3 * torch.randn(heads, group, pages + 1, generator=random)
    read = torch.rand(heads, pages + 1, generator=random) < 0.4
    read[:, -1] = True
    shares, totals = logs.softmax(-1), logs.logsumexp(-1)
    found = index.rest(blocks, shares, read, totals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_index, "HAS_NUMBA", False)
        in_torch = index.rest(blocks, shares, read, totals)
    left = logs[..., :-1].masked_fill(read[:, None, :-1], -math.inf)
    expected = left.softmax(-1).nan_to_num(0.0) @ values.mean(2)
    for part in (found, in_torch):
        torch.testing.assert_close(part.lse, left.logsumexp(-1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part.output, expected, rtol=0, atol=0.02)


def test_values_that_are_not_finite_show_where_they_are_not_read_and_not_where_they_are():
    index, blocks, values, _ = indexed(40)
    values[1, 7, 3, 2] = math.nan
    index.put(blocks, torch.randn(2, 40, 8, 16), values)
    shares, totals = torch.full((2, 4, 41), 1 / 41), torch.zeros(2, 4)
    read = torch.zeros(2, 41, dtype=torch.bool)
    found = index.rest(blocks, shares, read, totals).output
    assert found[1].isnan().all()
    assert found[0].isfinite().all()
    read[1, 7] = True
    assert index.rest(blocks, shares, read, totals).output.isfinite().all()


def test_the_estimate_brings_the_output_nearer_to_dense_attention():
    from penstock.benchmarks.sparse_keys import made_up

    layer = made_up("mid", seed=3, tokens=2049, steps=1, heads=2, size=32)
    query, keys, values = layer.queries[0], layer.keys[:, :2048], layer.values[:, :2048]
    index = BlockIndex(
        blocks=64, heads=2, block_tokens=32, head_size=32, summary_tokens=4, rounds=2, value_size=32
    )
    index.put(torch.arange(64), keys.unflatten(1, (64, 32)), values.unflatten(1, (64, 32)))
    logs = torch.empty(2, 4, 64)
    index.log_masses(query, torch.arange(64), logs)
    shares, totals = logs.softmax(-1), logs.logsumexp(-1)
    pages = shares.sum(1) >= shares.sum(1).topk(8).values[:, -1:]
    part = attend(query, keys, values, pages.repeat_interleave(32, 1))
    whole = attend(query, keys, values).output
    merged = merge(part, index.rest(torch.arange(64), shares, pages, totals))
    assert (merged.output - whole).norm() < 0.7 * (part.output - whole).norm()
