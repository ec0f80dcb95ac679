"""Compiled kernels against the torch code beside them, over odd shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from penstock.kernels.sparse import block_index, fused_exact, head_rows, page_choice
from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.compiled_math import exp, log
from penstock.kernels.sparse.head_rows import Read

HEADS = st.integers(1, 3)
GROUPS = st.sampled_from([1, 2, 4, 7, 9])
SIZES = st.sampled_from([1, 20, 64])
PAGES = st.sampled_from([1, 2, 31, 33, 70])
SEEDS = st.integers(0, 10_000)


def in_torch(function, *arguments):
    """Call ``function`` as if Numba were not installed."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (block_index, page_choice, head_rows):
            patch.setattr(module, "HAS_NUMBA", False)
        return function(*arguments)


@pytest.mark.parametrize("name", ["exp", "log"])
def test_scalar_functions_are_accurate_over_their_range(name):
    values = np.linspace(-87, 80, 401) if name == "exp" else np.exp(np.linspace(-80, 80, 401))
    values = values.astype(np.float32)
    found = np.array([{"exp": exp, "log": log}[name](value) for value in values])
    np.testing.assert_allclose(found, getattr(np, name)(values), rtol=1e-6, atol=1e-6)


def test_scalar_functions_keep_what_is_no_number():
    assert math.isnan(exp(np.float32(math.nan)))
    assert math.isnan(log(np.float32(math.nan)))
    assert exp(np.float32(-math.inf)) < 1e-37


@settings(max_examples=40, deadline=None)
@given(HEADS, GROUPS, SIZES, PAGES, SEEDS, st.sampled_from([1, 5, 11]), st.sampled_from([0.0, 1.0, 30.0]))
def test_estimated_masses(heads, group, size, pages, seed, summary_tokens, scale):
    random = torch.Generator().manual_seed(seed)
    index = BlockIndex(
        blocks=pages + 3,
        heads=heads,
        block_tokens=11,
        head_size=size,
        summary_tokens=summary_tokens,
        rounds=1,
    )
    blocks = torch.randperm(pages + 3, generator=random)[:pages]
    index.put(blocks, torch.randn(heads, pages, 11, size, generator=random))
    query = torch.randn(heads, group, size, generator=random) * scale
    found, expected = (torch.full((heads, group, pages + 1), 7.0) for _ in range(2))
    index.log_masses(query, blocks, found)
    in_torch(index.log_masses, query, blocks, expected)
    # Compiled, no cluster counts less than e^-87 of the largest mass; e^-75 dwarfs a page full of those.
    least = expected[..., :-1].amax(-1, keepdim=True) - 75
    found[..., :-1], expected[..., :-1] = (each[..., :-1].clamp(min=least) for each in (found, expected))
    # Compiled, a query has 16 bits a channel.
    atol = 1e-3 + float(query.abs().amax()) * size / 2**14
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)
    assert (found[..., -1] == 7.0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_leaves_its_page_alone_without_a_mass(bad):
    index = BlockIndex(blocks=40, heads=2, block_tokens=8, head_size=16, summary_tokens=4, rounds=2)
    keys = torch.randn(2, 40, 8, 16)
    keys[1, 35, 3, 2] = bad
    index.put(torch.arange(40), keys)
    logs = torch.empty(2, 3, 40)
    index.log_masses(torch.randn(2, 3, 16), torch.arange(40), logs)
    broken = torch.zeros(2, 40, dtype=torch.bool)
    broken[1, 35] = True
    assert torch.equal(~logs.isfinite(), broken[:, None].expand(-1, 3, -1))


@settings(max_examples=40, deadline=None)
@given(
    HEADS, GROUPS, SIZES, SEEDS, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.data()
)
def test_exact_masses_from_a_cache(heads, group, size, seed, dtype, permuted, data):
    random = torch.Generator().manual_seed(seed)
    tokens, stride = 6, heads + data.draw(st.integers(0, 2))
    # A pool in which everything but the request's own keys is NaN.
    rows = torch.full((9 * stride, 2 * tokens * size), math.nan, dtype=dtype)
    blocks = torch.randperm(9, generator=random)[: data.draw(st.integers(1, 9))]
    keys = torch.randn(heads, len(blocks), tokens, size, generator=random).to(dtype)
    places = torch.arange(tokens * size).view(size, tokens).t().flatten()
    if permuted:
        places = torch.randperm(tokens * size, generator=random)
    for head in range(heads):
        for page, block in enumerate(blocks.tolist()):
            rows[block * stride + head, places] = keys[head, page].flatten()
    tail = data.draw(st.integers(1, tokens))
    chosen = data.draw(st.sets(st.integers(0, len(blocks) - 1)))
    pages = torch.tensor(sorted({*chosen, len(blocks) - 1}))
    query = torch.randn(heads, group, size, generator=random)
    logs = torch.full((heads, group, len(blocks)), 7.0)
    bits = rows.view(torch.int16) if dtype == torch.bfloat16 else rows
    listed = (places if permuted else torch.empty(0, dtype=torch.int64)).numpy()
    arrays = (each.numpy() for each in (blocks, pages, query))
    fused_exact.exact_log_masses(bits.numpy(), stride, 0, listed, *arrays, tail, logs.numpy())
    expected = torch.full_like(logs, 7.0)
    expected[..., pages] = page_choice.exact_log_masses(query, keys[:, pages], tail)
    torch.testing.assert_close(logs, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(HEADS, GROUPS, PAGES, SEEDS, st.sampled_from([0.0, 0.5, 4.0, 60.0]), st.floats(0.01, 1.0))
def test_ranked_pages(heads, group, pages, seed, scale, mass):
    random = torch.Generator().manual_seed(seed)
    logs = torch.randn(heads, group, pages, generator=random) * scale
    logs[torch.rand(logs.shape, generator=random) < 0.05] = math.nan
    always = torch.tensor([pages - 1])
    expected, kept, sums = in_torch(page_choice.weigh, logs.clone(), always)
    shares, also_kept, totals = page_choice.weigh(logs.clone(), always)
    torch.testing.assert_close(shares, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(totals, sums, rtol=1e-4, atol=1e-4)
    assert torch.equal(kept, also_kept)
    asked = torch.full((heads,), mass)
    found = page_choice.choose_pages("ranked", shares, kept, asked)
    fewest = in_torch(page_choice.choose_pages, "ranked", shares, kept, asked)
    had, could = ((shares * chosen[:, None]).sum(-1) for chosen in (found, fewest))
    assert (found & kept == kept).all()
    assert (had >= torch.minimum(could, asked[:, None]) - 2e-6).all()
    # Sums that differ by their rounding may change places.
    assert ((found.sum(1) - fewest.sum(1)).abs() <= 1).all()


@settings(max_examples=40, deadline=None)
@given(HEADS, GROUPS, PAGES, SEEDS, st.floats(0, 1.2), st.booleans())
def test_the_most_massive_pages(heads, group, pages, seed, part, equal):
    random = torch.Generator().manual_seed(seed)
    shares = torch.rand(heads, group, pages, generator=random)
    shares = (shares * 3).round() / 8 if equal else shares
    kept = torch.rand(heads, pages, generator=random) < 0.2
    count = int(part * pages)
    found = page_choice.most_massive(shares, kept, count)
    expected = in_torch(page_choice.most_massive, shares, kept, count)
    assert (found & kept == kept).all()
    assert torch.equal(found.sum(1), expected.sum(1))
    had, could = ((shares.sum(1) * chosen).sum(1) for chosen in (found, expected))
    torch.testing.assert_close(had, could)


def test_equal_pages_are_taken_from_the_front():
    shares = torch.full((1, 2, 10), 0.1)
    kept = torch.zeros(1, 10, dtype=torch.bool)
    kept[:, 9] = True
    found = page_choice.choose_pages("ranked", shares, kept, torch.tensor([0.45]))
    assert found[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 9]


@settings(max_examples=40, deadline=None)
@given(HEADS, st.lists(st.tuples(PAGES, st.booleans()), min_size=1, max_size=3), SEEDS)
def test_rows_of_blocks(heads, requests, seed):
    random = torch.Generator().manual_seed(seed)
    reads = []
    for pages, whole in requests:
        chosen = torch.rand(heads, pages, generator=random) < 0.3
        chosen[:, -1] = True
        blocks = torch.randperm(500, generator=random)[:pages]
        reads.append(Read(blocks, None if whole else chosen, 5))
    found = head_rows.head_rows(reads, heads, 16, heads + 1)
    expected = in_torch(head_rows.head_rows, reads, heads, 16, heads + 1)
    assert torch.equal(found.table, expected.table)
    assert torch.equal(found.lengths, expected.lengths)
    assert found.table.is_contiguous()
