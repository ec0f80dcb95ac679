"""The run allocator: what a pool may rely on, checked against a plain set of free blocks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.connectors.alloc_pairing import fill_window, pieces_of
from penstock.connectors.allocator import AllocatorConfig, RunAllocator
from penstock.connectors.runs import Run, count_blocks, join_runs, runs_of


def full_pool(num_blocks, config=None):
    allocator = RunAllocator(num_blocks, config)
    allocator.release(range(1, num_blocks), worthless=True)
    return allocator


class Model:
    """Free blocks as a set, live requests as lists: the brute-force reference."""

    def __init__(self, num_blocks, seed):
        self.rng = random.Random(seed)
        self.allocator = full_pool(num_blocks)
        self.num_blocks = num_blocks
        self.free = set(range(1, num_blocks))
        self.live = {}
        self.fetched = []
        self.names = 0

    def take(self, key, count, position):
        blocks = self.allocator.allocate(count, key, position)
        assert len(blocks) == count == len(set(blocks))
        assert self.free.issuperset(blocks)
        self.free.difference_update(blocks)
        return blocks

    def begin(self):
        if not self.free:
            return
        total = self.rng.randint(1, min(len(self.free) + 20, self.num_blocks // 3))
        hits = self.rng.choice((0, 0, self.rng.randrange(total)))
        key, self.names = self.names, self.names + 1
        if self.rng.random() < 0.8:
            self.allocator.announce(key, total, self.sender(total) if self.rng.random() < 0.4 else ())
        chunk = self.rng.choice((total - hits, self.rng.randint(1, total - hits)))
        if chunk <= len(self.free):
            self.live[key] = (hits, self.take(key, chunk, hits))

    def sender(self, total):
        runs, left = [], total
        while left:
            length = self.rng.randint(1, left)
            runs.append(Run(self.rng.randrange(10**6), length))
            left -= length
        return runs

    def grow(self):
        if self.live and self.free:
            key = self.rng.choice(list(self.live))
            hits, blocks = self.live[key]
            blocks += self.take(key, self.rng.randint(1, min(9, len(self.free))), hits + len(blocks))

    def end(self):
        if self.live:
            key = self.rng.choice(list(self.live))
            _, blocks = self.live.pop(key)
            self.allocator.close(key)
            hashed = self.rng.randint(0, len(blocks))
            self.allocator.release(blocks[hashed:][::-1], worthless=True)
            self.allocator.release(blocks[:hashed][::-1])
            self.free.update(blocks)
            if self.rng.random() < 0.9:
                self.allocator.forget(key)

    def hit(self):
        if self.free:
            first = self.rng.choice(sorted(self.free))
            for block in range(first, first + self.rng.randint(1, 12)):
                if block in self.free:
                    self.allocator.fetch(block)
                    self.free.discard(block)
                    self.fetched.append(block)

    def miss(self):
        self.allocator.release(self.fetched[::-1])
        self.free.update(self.fetched)
        self.fetched = []

    def anonymous(self):
        if self.free:
            self.fetched += self.take(None, self.rng.randint(1, min(7, len(self.free))), 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_blocks", [12, 300])
def test_thousands_of_operations_lose_no_block_and_hand_none_out_twice(num_blocks, seed):
    model = Model(num_blocks, seed)
    steps = [model.begin, model.grow, model.grow, model.end, model.hit, model.miss, model.anonymous]
    for number in range(2000):
        model.rng.choice(steps)()
        assert model.allocator.num_free == len(model.free)
        if number % 40 == 0:
            model.allocator.check_integrity(model.free)
    model.allocator.check_integrity(model.free)


@given(st.integers(2, 40), st.data())
def test_every_free_block_can_be_had_whatever_others_reserve(num_blocks, data):
    allocator = full_pool(num_blocks)
    allocator.announce("hungry", num_blocks)
    allocator.announce("other", num_blocks)
    first = data.draw(st.integers(1, num_blocks - 1))
    taken = allocator.allocate(first, "hungry", 0)
    taken += allocator.allocate(num_blocks - 1 - first, "other", 0)
    assert sorted(taken) == list(range(1, num_blocks))
    with pytest.raises(ValueError, match="1 blocks asked for, 0 are free"):
        allocator.allocate(1, "other", num_blocks - 1 - first)


def test_chunks_of_an_announced_prompt_make_one_run_though_others_come_between():
    allocator = full_pool(500)
    allocator.announce("a", 100)
    allocator.announce("b", 100)
    blocks = {"a": [], "b": []}
    for chunk in range(10):
        for key, held in blocks.items():
            held.extend(allocator.allocate(10, key, chunk * 10))
    assert [len(runs_of(held)) for held in blocks.values()] == [1, 1]


def test_decoding_extends_the_last_run():
    allocator = full_pool(1000)
    held = {key: allocator.allocate(20, key, 0) for key in "abc"}
    for _ in range(4):
        for key, blocks in held.items():
            blocks.extend(allocator.allocate(1, key, len(blocks)))
    assert [len(runs_of(blocks)) for blocks in held.values()] == [1, 1, 1]


def test_a_received_prompt_reserves_nothing_for_its_growth():
    allocator = full_pool(1000)
    allocator.announce("received", 20, [Run(5000, 20)])
    allocator.announce("computed", 20)
    received = allocator.allocate(20, "received", 0)
    computed = allocator.allocate(20, "computed", 0)
    assert computed[0] == received[-1] + 1, "nothing is kept free behind a prompt that nobody pulls again"
    third = allocator.allocate(20, "third", 0)
    assert third[0] > computed[-1] + 1


def test_reserved_blocks_are_free_and_can_be_hit():
    allocator = full_pool(100)
    allocator.announce("a", 60)
    first = allocator.allocate(10, "a", 0)
    assert allocator.num_free == 99 - 10
    allocator.fetch(first[-1] + 5)
    rest = allocator.allocate(50, "a", 10)
    assert first[-1] + 5 not in rest


def cached_chains(allocator, lengths):
    """Fill a pool with one finished request a chain, in order of age; returns the chains' blocks."""
    chains = []
    for number, length in enumerate(lengths):
        chains.append(allocator.allocate(length, number, 0))
    for number, chain in enumerate(chains):
        allocator.close(number)
        allocator.release(chain[::-1])
    return chains


def test_the_oldest_chain_goes_first():
    allocator = full_pool(401, AllocatorConfig(slack_factor=0.0))
    chains = cached_chains(allocator, [100] * 4)
    assert set(allocator.allocate(60, "new", 0)) <= set(chains[0])


def test_a_chain_is_evicted_from_its_tail():
    allocator = full_pool(201, AllocatorConfig(slack_factor=0.0, most_slack=0))
    (chain,) = cached_chains(allocator, [200])
    assert allocator.allocate(50, "new", 0) == chain[150:]


def test_what_was_never_cached_goes_before_what_was():
    allocator = full_pool(301, AllocatorConfig(most_slack=0))
    first, second, third = (allocator.allocate(100, key, 0) for key in "abc")
    allocator.release(first[::-1])
    allocator.release(third[::-1])
    allocator.release(second[::-1], worthless=True)
    assert set(allocator.allocate(100, "new", 0)) == set(second)


def test_growth_leaves_a_hot_neighbour_alone():
    config = AllocatorConfig(most_slack=0, growth_limit=0.1)
    allocator = full_pool(1001, config)
    old, growing, hot = (
        allocator.allocate(count, key, 0) for key, count in (("o", 400), ("g", 200), ("h", 400))
    )
    allocator.release(old[::-1])
    allocator.release(hot[::-1])
    assert growing[-1] + 1 == hot[0]
    assert allocator.allocate(1, "g", 200)[0] in old


def test_a_receiver_breaks_where_the_sender_breaks():
    allocator = full_pool(301, AllocatorConfig(most_slack=0))
    held = allocator.allocate(300, "all", 0)
    allocator.close("all")
    for start, stop in ((0, 100), (110, 150), (160, 220)):
        allocator.release(held[start:stop][::-1], worthless=True)
    sender = [Run(1000, 60), Run(2000, 40), Run(3000, 100)]
    allocator.announce("new", 200, sender)
    assert len(join_runs(sender, runs_of(allocator.allocate(200, "new", 0)))) == 3


def test_local_hits_are_left_out_of_the_sender_runs():
    allocator = full_pool(301, AllocatorConfig(most_slack=0))
    sender = [Run(1000, 50), Run(2000, 50)]
    allocator.announce("new", 100, sender)
    blocks = allocator.allocate(70, "new", 30)
    assert len(join_runs([Run(1030, 20), Run(2000, 50)], runs_of(blocks))) == 2


def test_the_same_calls_give_the_same_blocks():
    def played():
        model = Model(200, 3)
        taken = []
        for _ in range(300):
            model.rng.choice([model.begin, model.grow, model.end])()
            taken.append({key: list(blocks) for key, (_, blocks) in model.live.items()})
        return taken

    assert played() == played()


run_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(run_lengths, st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_windows_are_filled_with_disjoint_pieces_and_cut_few(lengths, windows):
    runs = [Run(1000 * number, length) for number, length in enumerate(lengths)]
    pieces = pieces_of(runs, 5)
    taken = []
    for window in windows:
        before = len(pieces)
        chosen = fill_window(pieces, window)
        assert sum(piece.length for piece in chosen) <= window
        assert len(chosen) + len(pieces) - before <= 1
        taken += chosen
    positions = [p for piece in taken + pieces for p in range(piece.offset, piece.offset + piece.length)]
    assert sorted(positions) == list(range(5, 5 + count_blocks(runs)))
