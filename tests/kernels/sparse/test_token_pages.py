"""A cache of one row a token: what is read of it, and attention over chosen pages, against plain softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.sparse import token_pages
from penstock.kernels.sparse.attention import Partial, attend, merge
from penstock.kernels.sparse.head_rows import Read
from penstock.kernels.sparse.page_choice import exact_log_masses
from penstock.kernels.sparse.token_pages import TokenPages

POOL = 40
WAYS = ("compiled", "torch")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    choose(request.param, monkeypatch)
    return str(request.param)


def choose(way: str, patch: pytest.MonkeyPatch) -> None:
    if way == "compiled":
        pytest.importorskip("numba")
    else:
        patch.setattr(token_pages, "HAS_NUMBA", False)


class Pool:
    """A pool full of NaN but for the pages of some requests, with tokens of several layers side by side."""

    def __init__(
        self, draw: torch.Generator, page: int, heads: int, sizes: tuple[int, int], dtype, layers: int
    ):
        self.page, self._draw = page, draw
        self._free = torch.randperm(POOL, generator=draw).tolist()
        # A slot of odd length more than whole pages, as a pool may have.
        row = heads * sum(sizes)
        self._all = torch.full(((POOL * page) + 1, layers * row), math.nan, dtype=dtype)
        mine = self._all[:, (layers - 1) * row :]
        self.keys, self.values = (
            part.unflatten(1, (heads, -1)) for part in mine.split([heads * size for size in sizes], 1)
        )
        self.cache = TokenPages(self.keys, self.values, page)

    def request(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks (int64 [P]) and slots (int64 [n]) of a request of random keys and values."""
        blocks = torch.tensor([self._free.pop() for _ in range(-(-tokens // self.page))])
        slots = (blocks[:, None] * self.page + torch.arange(self.page)).flatten()[:tokens]
        for rows in (self.keys, self.values):
            rows[slots] = torch.randn(tokens, *rows.shape[1:], generator=self._draw).to(rows.dtype)
        return blocks, slots


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WAYS),
    st.integers(0, 10_000),
    st.sampled_from([1, 3, 16]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([(4, 4), (16, 8), (64, 64)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 3]),
    st.lists(st.integers(1, 100), min_size=1, max_size=3),
    st.sampled_from([1, 2]),
)
def test_attention_over_chosen_pages_is_softmax_over_their_tokens_and_nothing_else_is_read(
    way, seed, page, heads, group, sizes, dtype, layers, lengths, threads
):
    lengths = [min(length, 12 * page) for length in lengths]
    draw = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        choose(way, patch)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        pool = Pool(draw, page, heads, sizes, dtype, layers)
        queries = torch.randn(len(lengths), heads, group, sizes[0], generator=draw)
        reads, slots = [], []
        for tokens in lengths:
            blocks, own = pool.request(tokens)
            pages = torch.rand(heads, len(blocks), generator=draw) < 0.5
            pages[:, -1] = True
            reads.append(Read(blocks, None if tokens % 7 == 0 else pages, tokens - (len(blocks) - 1) * page))
            slots.append(own)
        found = pool.cache.attend(queries, reads)
    for number, (read, own) in enumerate(zip(reads, slots, strict=True)):
        keys, values = (rows[own].transpose(0, 1) for rows in (pool.keys, pool.values))
        chosen = None if read.pages is None else read.pages.repeat_interleave(page, 1)[:, : len(own)]
        wanted = attend(queries[number], keys, values, chosen)
        torch.testing.assert_close(found.output[number], wanted.output, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(found.lse[number], wanted.lse, rtol=2e-5, atol=2e-5)


def test_a_page_of_the_request_that_a_head_does_not_choose_is_not_read(way):
    pool = Pool(torch.Generator().manual_seed(1), 4, 2, (8, 8), torch.float32, 1)
    blocks, slots = pool.request(12)
    pool.values[slots[4:8], 1] = math.nan
    pool.keys[slots[4:8], 1] = math.nan
    pages = torch.tensor([[True, True, True], [True, False, True]])
    found = pool.cache.attend(torch.ones(1, 2, 1, 8), [Read(blocks, pages, 4)])
    assert found.output.isfinite().all()
    pages[1, 1] = True
    found = pool.cache.attend(torch.ones(1, 2, 1, 8), [Read(blocks, pages, 4)])
    assert found.output[0, 0].isfinite().all()
    assert found.output[0, 1].isnan().all()


def test_the_log_sum_exp_merges_two_parts_into_the_whole(way):
    draw = torch.Generator().manual_seed(2)
    pool = Pool(draw, 4, 2, (8, 8), torch.float32, 1)
    blocks, _ = pool.request(30)
    query = 5 * torch.randn(1, 2, 3, 8, generator=draw)
    first = torch.rand(2, len(blocks), generator=draw) < 0.5
    parts = [pool.cache.attend(query, [Read(blocks, pages, 2)]) for pages in (first, ~first)]
    whole = pool.cache.attend(query, [Read(blocks, None, 2)])
    merged = merge(*parts)
    torch.testing.assert_close(merged.output, whole.output)
    torch.testing.assert_close(merged.lse, whole.lse)


def test_what_stands_for_the_rest_is_merged_into_its_request_alone(way):
    draw = torch.Generator().manual_seed(4)
    pool = Pool(draw, 4, 2, (8, 8), torch.float32, 1)
    requests = [pool.request(12)[0] for _ in range(2)]
    queries = torch.randn(2, 2, 3, 8, generator=draw)
    rest = Partial(torch.randn(2, 3, 8, generator=draw), torch.randn(2, 3, generator=draw))
    plain = pool.cache.attend(queries, [Read(blocks, None, 4) for blocks in requests])
    reads = [Read(requests[0], None, 4), Read(requests[1], None, 4, rest)]
    found = pool.cache.attend(queries, reads)
    assert torch.equal(found.output[0], plain.output[0])
    wanted = merge(Partial(plain.output[1], plain.lse[1]), rest)
    torch.testing.assert_close(found.output[1], wanted.output)
    torch.testing.assert_close(found.lse[1], wanted.lse)


def test_values_of_blocks_are_those_that_were_written(way):
    pool = Pool(torch.Generator().manual_seed(5), 4, 2, (8, 6), torch.float32, 1)
    blocks, slots = pool.request(8)
    assert torch.equal(pool.cache.read_values(blocks).flatten(1, 2), pool.values[slots].transpose(0, 1))


def test_no_page_at_all_weighs_nothing(way):
    pool = Pool(torch.Generator().manual_seed(3), 4, 1, (8, 8), torch.float32, 1)
    blocks, _ = pool.request(8)
    pages = torch.zeros(1, 2, dtype=torch.bool)
    found = pool.cache.attend(torch.ones(1, 1, 2, 8), [Read(blocks, pages, 4)])
    assert not found.output.any()
    assert found.lse.isneginf().all()


@pytest.mark.parametrize("heads", [slice(None), slice(1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_exact_masses_are_those_of_the_pages(way, heads, dtype):
    draw = torch.Generator().manual_seed(4)
    pool = Pool(draw, 8, 3, (16, 4), dtype, 2)
    blocks, slots = pool.request(44)
    assert pool.cache.blocks == POOL
    rows = pool.keys[slots[:40]].transpose(0, 1)[heads].unflatten(1, (5, 8))
    assert torch.equal(pool.cache.read(blocks[:5], heads), rows)
    query = torch.randn(3, 2, 16, generator=draw)[heads]
    pages = torch.tensor([0, 2, 5])
    logs = torch.full((len(query), 2, 6), 7.0)
    pool.cache.log_masses(query, blocks, pages, 4, logs, heads)
    keys = pool.cache.read(blocks[pages], heads)
    torch.testing.assert_close(logs[..., pages], exact_log_masses(query, keys, 4), rtol=1e-5, atol=1e-5)
    assert (logs[..., [1, 3, 4]] == 7.0).all()
