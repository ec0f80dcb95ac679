"""FlowKV's page allocator beside SGLang's own: what stock admits is admitted, and pages lie together."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from penstock.benchmarks.sglang_pools import PAGE as BENCH_PAGE
from penstock.benchmarks.sglang_pools import PrefillPool
from penstock.connectors.runs import runs_of
from penstock.plugins.sglang.run_allocator import RunPagedAllocator

PAGE, PAGES = 4, 64


def make(kind: type, page: int = PAGE, pages: int = PAGES) -> PagedTokenToKVPoolAllocator:
    return kind(page * pages, page, torch.float32, "cpu", SimpleNamespace(), True)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def extend(
    allocator: PagedTokenToKVPoolAllocator, before: int, after: int, held: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Tokens ``before`` to ``after`` of a prompt whose tokens so far lie at ``held``."""
    last = -1 if held is None or not len(held) else int(held[-1])
    ends = ids(before), ids(after)
    return allocator.alloc_extend(ends[0], ends[0], ends[1], ends[1], ids(last), after - before)


@pytest.mark.parametrize("seed", range(12))
def test_it_admits_what_stock_admits_and_never_hands_a_page_out_twice(seed: int):
    draw = random.Random(seed)
    ours, stock = make(RunPagedAllocator), make(PagedTokenToKVPoolAllocator)
    held: dict[int, list[torch.Tensor]] = {}
    for step in range(250):
        kind = draw.random()
        if kind < 0.4:
            length = draw.randint(1, 60)
            found = [extend(allocator, 0, length) for allocator in (ours, stock)]
            if found[1] is not None:
                held[step] = found
        elif kind < 0.7 and held:
            some = draw.sample(sorted(held), min(len(held), 3))
            lengths = ids(*(len(held[k][0]) + 1 for k in some))
            found = [
                allocator.alloc_decode(lengths, lengths, torch.stack([held[k][side][-1] for k in some]))
                for side, allocator in enumerate((ours, stock))
            ]
            for row, k in enumerate(some if found[1] is not None else []):
                held[k] = [torch.cat([held[k][side], found[side][row : row + 1]]) for side in range(2)]
        elif held:
            mine, its = held.pop(draw.choice(sorted(held)))
            ours.free(mine)
            stock.free(its)
            found = [None, None]
        else:
            continue
        assert (found[0] is None) == (found[1] is None)
        assert ours.available_size() == stock.available_size()
        used = torch.cat([pair[0] for pair in held.values()]) if held else ids()
        assert len(used.unique()) == len(used)
        free = ours.get_all_free_pages()
        assert len(free) * PAGE == ours.available_size()
        assert not set(free.tolist()) & set((used // PAGE).tolist())
        for pair in held.values():
            # Whole pages, each in its own order, as stock lays tokens out.
            assert (pair[0] % PAGE == torch.arange(len(pair[0])) % PAGE).all()


def test_a_prompt_of_several_chunks_lies_together_in_a_worn_pool():
    allocator = make(RunPagedAllocator)
    small = [extend(allocator, 0, PAGE) for _ in range(PAGES // 2)]
    for row in small[::2]:
        allocator.free(row)
    first = extend(allocator, 0, 3 * PAGE)
    other = extend(allocator, 0, 2 * PAGE)
    assert first is not None
    assert other is not None
    rest = extend(allocator, 3 * PAGE, 8 * PAGE, first)
    assert rest is not None
    for tokens, most in ((torch.cat([first, rest]), 2), (other, 1)):
        assert len(runs_of((tokens[::PAGE] // PAGE).tolist())) <= most


@pytest.mark.parametrize("kind", [RunPagedAllocator, PagedTokenToKVPoolAllocator])
def test_a_full_prefix_cache_gives_up_what_is_lacking_and_a_share_of_the_pool_at_once(kind: type):
    pages = 400
    pool = PrefillPool(make(kind, BENCH_PAGE, pages))
    total = pages * BENCH_PAGE
    spare = 10 * BENCH_PAGE if kind is RunPagedAllocator else 0
    evictions = 0
    for number in range(pages):
        before = pool.allocator.available_size()
        # Each prompt is its own, of two pages and a piece of one.
        prompt = pool.begin(array("q", [number] * (2 * BENCH_PAGE + 1)))
        pool.extend(prompt, len(prompt.tokens))
        pool.end(prompt)
        left = pool.allocator.available_size()
        assert left + pool.cache.full_evictable_size() == total
        if left + 2 * BENCH_PAGE > before:
            evictions += 1
            # The cache gives up whole prompts.
            assert spare <= left <= spare + 4 * BENCH_PAGE
    assert evictions > 20


def test_a_cache_that_has_no_more_than_is_lacking_is_no_reason_to_refuse():
    pool = PrefillPool(make(RunPagedAllocator, BENCH_PAGE))
    held = pool.begin(array("q", [1] * ((PAGES - 3) * BENCH_PAGE)))
    pool.extend(held, len(held.tokens))
    for number in (2, 3):
        prompt = pool.begin(array("q", [number] * (2 * BENCH_PAGE)))
        pool.extend(prompt, len(prompt.tokens))
        pool.end(prompt)


def test_every_page_that_is_handed_out_is_counted():
    allocator = make(RunPagedAllocator)
    tokens = extend(allocator, 0, 5 * PAGE)
    assert tokens is not None
    pages = (tokens[::PAGE] // PAGE).numpy()
    before = allocator.epochs.copy()
    allocator.free(tokens)
    assert (allocator.epochs == before).all()
    while (again := extend(allocator, 0, PAGES * PAGE)) is None:
        pytest.fail("the whole pool is free")
    assert len(again) == PAGES * PAGE
    assert (allocator.epochs[pages] == before[pages] + 1).all()
    assert allocator.epochs[0] == 0
    assert allocator.get_kvcache().epochs is allocator.epochs
    assert np.array_equal(allocator.epochs[1:] > 0, np.ones(PAGES, dtype=bool))
