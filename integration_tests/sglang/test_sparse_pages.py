"""Summaries of pages while requests share, grow, decode and leave, with SGLang's own allocators."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang_sparse_rig import CONFIG, GROUP, HEADS, PAGE, PAGES, SIZE, Rig, all_pages, hook, ids

from penstock.kernels.sparse.block_index import BlockIndex
from penstock.plugins.sglang.run_allocator import RunPagedAllocator


@pytest.fixture(autouse=True)
def hooked(monkeypatch) -> None:
    hook(monkeypatch)


class Sequence:
    """Slots of a request, and how many of its first pages it has from the cache."""

    def __init__(self, slots: torch.Tensor, shared: int) -> None:
        self.slots, self.shared = slots, shared


class Life:
    """Requests come, share prefixes, grow, decode and leave; a model knows what is summarised."""

    def __init__(self, seed: int, allocator: type[PagedTokenToKVPoolAllocator]) -> None:
        self.rig = Rig(seed, allocator=allocator)
        self.draw = random.Random(seed)
        self.running: list[Sequence] = []
        self.cached: list[torch.Tensor] = []
        """Whole pages that a prefix cache keeps, each row of one request that left."""
        self.known: dict[int, set[int]] = {1: set(), 2: set()}
        self.recycled = 0

    def come(self) -> None:
        """A request, perhaps behind a cached prefix."""
        prefix = ids()
        if self.cached and self.draw.random() < 0.6:
            row = self.draw.choice(self.cached)
            prefix = row[: PAGE * self.draw.randint(1, len(row) // PAGE)]
        self._grow(Sequence(prefix, len(prefix) // PAGE), self.draw.randint(1, 50), self.running.append)

    def grow(self) -> None:
        """The next chunk of a prompt, which may begin within a page."""
        if self.running:
            request = self.draw.choice(self.running)
            self._grow(request, self.draw.randint(1, 20), lambda _: None)

    def _grow(self, request: Sequence, tokens: int, then: Any) -> None:
        found = self.rig.extend(request.slots, tokens)
        if found is None:
            self.evict()
            return
        self._handed_out(found[len(request.slots) :])
        request.slots = found
        then(request)

    def decode(self) -> None:
        """A token for some of the requests."""
        some = self.draw.sample(self.running, min(3, len(self.running)))
        if not some:
            return
        lengths = ids(*(len(request.slots) + 1 for request in some))
        last = torch.stack([request.slots[-1] for request in some])
        found = self.rig.allocator.alloc_decode(lengths, lengths, last)
        if found is None:
            self.evict()
            return
        self.rig.write(found)
        self._handed_out(found)
        for request, slot in zip(some, found, strict=True):
            request.slots = torch.cat([request.slots, slot[None]])

    def leave(self) -> None:
        """Its pages go back, or, but for the last part of one, to the prefix cache."""
        if not self.running:
            return
        request = self.running.pop(self.draw.randrange(len(self.running)))
        own = request.slots[request.shared * PAGE :]
        whole = len(own) // PAGE * PAGE
        if request.shared == 0 and whole and self.draw.random() < 0.7:
            self.cached.append(own[:whole])
            own = own[whole:]
        self.rig.allocator.free(own)

    def evict(self) -> None:
        """A cached prefix that no request uses."""
        used = {int(slot) for request in self.running for slot in request.slots[: request.shared * PAGE]}
        free = [row for row in self.cached if not used.intersection(row.tolist())]
        if free:
            row = self.draw.choice(free)
            self.cached = [each for each in self.cached if each is not row]
            self.rig.allocator.free(row)

    def clear(self) -> None:
        """SGLang flushes its cache when nothing runs."""
        while self.running:
            self.leave()
        self.cached = []
        self.rig.allocator.clear()

    def look(self) -> None:
        """A decode of a request in one layer: what is missing is as the model says, and nothing is stale."""
        if not self.running:
            return
        number = self.draw.choice([1, 2])
        layer = self.rig.sparse(number)
        pages = self.draw.choice(self.running).slots[::PAGE][:-1] // PAGE
        wanted = set(pages.tolist())
        assert set(layer.decode.index.missing(pages).tolist()) == wanted - self.known[number]
        layer.decode.summarise(pages)
        self.known[number] |= wanted
        if not wanted:
            return
        query = torch.randn(HEADS, GROUP, SIZE, generator=self.rig.draw)
        fresh = BlockIndex(
            blocks=PAGES + 1,
            heads=HEADS,
            block_tokens=PAGE,
            head_size=SIZE,
            summary_tokens=CONFIG.summary_tokens,
            rounds=CONFIG.summary_rounds,
        )
        fresh.put(pages, layer.pages.read(pages))
        logs = [torch.empty(HEADS, GROUP, len(pages)) for _ in range(2)]
        for index, row in zip((layer.decode.index, fresh), logs, strict=True):
            index.log_masses(query, pages, row)
        assert torch.equal(*logs)

    def _handed_out(self, slots: torch.Tensor) -> None:
        pages = {int(slot) // PAGE for slot in slots if slot % PAGE == 0}
        for known in self.known.values():
            self.recycled += len(known & pages)
            known.difference_update(pages)


@pytest.mark.parametrize("allocator", [PagedTokenToKVPoolAllocator, RunPagedAllocator])
@pytest.mark.parametrize("seed", range(6))
def test_a_summary_is_never_stale_and_is_taken_once_for_all_who_share_a_page(allocator, seed):
    life = Life(seed, allocator)
    kinds = [life.come, life.grow, life.decode, life.decode, life.leave, life.evict, life.look, life.look]
    for step in range(400):
        life.draw.choice(kinds)()
        if step % 150 == 149:
            life.clear()
    assert life.recycled > PAGES, "summaries that would be stale came up"


def test_pages_that_whole_allocations_hand_out_are_forgotten():
    rig = all_pages()
    slots = rig.extend(ids(), 60)
    rig.decode_pass(slots)
    pages = slots[::PAGE][:-1] // PAGE
    index = rig.sparse().decode.index
    assert not len(index.missing(pages))
    rig.allocator.free(slots)
    taken = rig.allocator.alloc(PAGE * PAGES)
    assert taken is not None
    assert len(index.missing(pages)) == len(pages)
    assert rig.allocator.alloc(PAGE) is None
