"""Compiled attention over shared runs against torch, over shapes that fit nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from penstock.kernels.shared_prefix.attention import SharedAttention
from penstock.kernels.shared_prefix.layout import MOST_ROWS, lay_out
from penstock.kernels.shared_prefix.reference import cascade
from penstock.kernels.shared_prefix.runs import Run, shared_runs

pytest.importorskip("numba")

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


@dataclass(frozen=True)
class Batch:
    """Requests with ``tables`` and ``lengths``; ``keys`` and ``values`` [blocks, N, H, D] of theirs alone,
    ``cache`` [blocks, H, N, 2 * D] with NaN wherever none of them has a token."""

    tables: list[list[int]]
    lengths: list[int]
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    cache: torch.Tensor

    @property
    def arrays(self):
        table = np.zeros((len(self.tables), max(map(len, self.tables)) + 1), np.int32)
        for row, blocks in zip(table, self.tables, strict=True):
            row[: len(blocks)] = blocks
        return table, np.array(self.lengths)

    def runs(self, **least):
        table, lengths = self.arrays
        return shared_runs(table, lengths // self.keys.shape[1], **least)

    def ours(self, runs, threads=1):
        """Output [B, H, G, D] by compiled kernels."""
        table, lengths = self.arrays
        requests, heads, group, size = self.query.shape
        layout = lay_out(
            table, lengths, runs, block_tokens=self.keys.shape[1], heads=heads, group=group, threads=threads
        )
        asked = self.query.flatten(1, 2)
        output = torch.full_like(asked, math.nan)
        SharedAttention(self.cache).attend(asked, layout, size**-0.5, group, output)
        return output.view(requests, heads, group, size)

    def reference(self, runs):
        query = self.query.float() * self.query.shape[-1] ** -0.5
        return cascade(query, self.keys.float(), self.values.float(), self.tables, self.lengths, runs).output


def batch(
    shares, tails, *, block_tokens=16, heads=2, group=4, size=64, dtype=torch.float32, seed=0, within=False
):
    """Requests ``tails`` [B] tokens behind blocks that they share: ``shares`` are pairs of requests and
    how many more blocks these have in common, one behind the other. ``within``: blocks of other layers lie
    between those of the cache."""
    generator = torch.Generator().manual_seed(seed)
    need = sum(count for _, count in shares) + sum(-(-tail // block_tokens) for tail in tails)
    free = (torch.randperm(need + 3, generator=generator) + 1).tolist()
    tables = [[] for _ in tails]
    for requests, count in shares:
        blocks = [free.pop() for _ in range(count)]
        for request in requests:
            tables[request] += blocks
    lengths = [len(table) * block_tokens + tail for table, tail in zip(tables, tails, strict=True)]
    for table, tail in zip(tables, tails, strict=True):
        table += [free.pop() for _ in range(-(-tail // block_tokens))]
    blocks = need + 4
    keys, values = (
        torch.randn(blocks, block_tokens, heads, size, generator=generator).to(dtype) for _ in range(2)
    )
    held = torch.zeros(blocks, block_tokens, dtype=torch.bool)
    for table, length in zip(tables, lengths, strict=True):
        for place, block in enumerate(table):
            held[block, : min(block_tokens, length - place * block_tokens)] = True
    shape = (blocks, heads, block_tokens, 2 * size)
    cache = (
        torch.empty(blocks, 3, *shape[1:], dtype=dtype)[:, 1] if within else torch.empty(shape, dtype=dtype)
    )
    parts = [torch.where(held[..., None, None], part, torch.nan) for part in (keys, values)]
    packed = parts[0].permute(0, 2, 3, 1).flatten(2), parts[1].permute(0, 2, 1, 3).flatten(2)
    cache.copy_(torch.cat(packed, 2).view(shape))
    query = torch.randn(len(tails), heads, group, size, generator=generator).to(dtype)
    return Batch(tables, lengths, query, keys, values, cache)


def compare(found, **arguments):
    runs = found.runs()
    want = found.reference([])
    torch.testing.assert_close(found.reference(runs), want)
    torch.testing.assert_close(found.ours(runs, **arguments).float(), want, **CLOSE[found.query.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 4, 16])
@pytest.mark.parametrize(("size", "block_tokens"), [(64, 16), (80, 32), (112, 96), (128, 128), (256, 64)])
def test_any_shape_is_what_torch_says(dtype, group, size, block_tokens):
    shares = [((0, 1, 2), 2), ((0, 2), 1)]
    found = batch(
        shares, [1, block_tokens + 5, 33, 7], group=group, size=size, block_tokens=block_tokens, dtype=dtype
    )
    assert len(found.runs()) == 2
    compare(found)


@pytest.mark.parametrize("requests", [2, 5, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_groups_of_any_number_are_read_on_any_number_of_threads(requests, threads):
    found = batch([(range(requests), 3)], [1 + 3 * request for request in range(requests)], block_tokens=16)
    compare(found, threads=threads)


def test_more_rows_than_a_part_may_have_are_several_parts():
    requests = 2 * MOST_ROWS // 16 + 1
    found = batch([(range(requests), 1)], [1] * requests, group=16, heads=1)
    compare(found)


def test_prefixes_within_prefixes_and_requests_that_end_with_one():
    shares = [((0, 1, 2, 3), 1), ((1, 2, 3), 2), ((2, 3), 1)]
    found = batch(shares, [0, 0, 5, 16, 9], block_tokens=16)
    assert {run.requests for run in found.runs()} == {(0, 1, 2, 3), (1, 2, 3), (2, 3)}
    for threads in (1, 2):
        compare(found, threads=threads)


def test_caches_in_which_layers_lie_between_blocks():
    compare(batch([((0, 1), 2)], [4, 20], within=True))


def test_nothing_is_read_but_what_a_request_has():
    """Everything else in the cache is NaN; what one request reads of its own block is not the others'."""
    found = batch([((0, 1), 2)], [5, 21, 3])
    runs = found.runs()
    assert found.ours(runs).isfinite().all()
    own = found.tables[1][-1]
    found.cache[own] = torch.nan
    answers = found.ours(runs)
    assert answers[1].isnan().all()
    assert answers[[0, 2]].isfinite().all()


def test_a_key_that_is_not_finite_shows_where_stock_shows_it():
    found = batch([((0, 1), 2)], [5, 6, 7])
    found.cache[found.tables[0][0], 1, 0, 0] = torch.nan
    answers = found.ours(found.runs())
    assert answers[[0, 1], 1].isnan().all()
    assert answers[:, 0].isfinite().all()
    assert answers[2].isfinite().all()


def test_scores_far_apart_do_not_overflow():
    found = batch([((0, 1), 2)], [5, 40])
    found.query.mul_(200)
    compare(found)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_step_reads_each_page_of_a_run_once_and_every_page_of_a_request(threads):
    tables = np.arange(60, dtype=np.int32).reshape(4, 15)
    tokens = np.array([150, 145, 32, 9])
    runs = [Run((0, 1, 2), 0, 2), Run((0, 1), 2, 6)]
    layout = lay_out(tables, tokens, runs, block_tokens=16, heads=2, group=4, threads=threads)
    assert len(layout.work) == threads
    done = sorted(map(tuple, np.concatenate(list(layout.work)).tolist()))
    assert done == [(item, head) for item in range(len(layout.items)) for head in range(2)]
    held = {request: [] for request in range(4)}
    pages = 0
    for row, first, last, tail, begin, end in layout.items.tolist():
        members = layout.members[begin:end].tolist()
        assert row in members
        pages += last - first
        for request in members:
            held[request] += [(page, 16 if page < last - 1 else tail) for page in range(first, last)]
    assert pages == 6 + 4 + 4 + 0 + 1
    for request, count in enumerate(tokens.tolist()):
        sizes = [16] * (count // 16) + [count % 16] * (count % 16 > 0)
        assert sorted(held[request]) == list(enumerate(sizes))
    for request in range(4):
        slots = layout.slots[layout.starts[request] : layout.starts[request + 1]]
        assert (layout.members[slots] == request).all()
        assert len(slots) == (layout.members == request).sum()


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (torch.zeros(2, 2, 16, 128, dtype=torch.float16), "of torch.float16"),
        (torch.zeros(2, 2, 16, 80), r"\(2, 2, 16, 80\)"),
        (torch.zeros(2, 16, 2, 128).transpose(1, 2), r"with strides \(4096, 128, 256, 1\)"),
    ],
)
def test_a_cache_that_kernels_do_not_read_is_refused(cache, message):
    with pytest.raises(ValueError, match=message):
        SharedAttention(cache)
