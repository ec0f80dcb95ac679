"""The index of free blocks against a list of one age a block."""

from __future__ import annotations

import random

import pytest

from penstock.connectors.free_index import WORTHLESS, AgeBands, FreeIndex

SIZE = 64


@pytest.mark.parametrize("seed", range(4))
def test_the_index_mirrors_a_plain_list(seed):
    rng = random.Random(seed)
    index, plain, holders = FreeIndex(SIZE), [None] * SIZE, [None] * SIZE
    clock = 1
    for _ in range(800):
        start = rng.randrange(SIZE)
        stop = rng.randint(start + 1, min(SIZE, start + 12))
        states = {plain[block] is None for block in range(start, stop)}
        action = rng.random()
        if states == {True}:
            stamp = rng.choice((WORTHLESS, clock))
            clock += rng.randint(1, 40)
            index.add(start, stop, stamp)
            plain[start:stop] = [stamp] * (stop - start)
        elif states == {False} and action < 0.5:
            index.cut(start, stop, evict=False)
            plain[start:stop] = [None] * (stop - start)
            holders[start:stop] = [None] * (stop - start)
        elif states == {False}:
            holder = rng.choice((None, "a", "b"))
            index.hold(start, stop, holder)
            holders[start:stop] = [holder] * (stop - start)
        index.check_integrity()
        found = [index.at(block) for block in range(SIZE)]
        assert [extent and extent.stamp for extent in found] == plain
        assert [extent and extent.holder for extent in found] == holders


def test_evicting_the_head_of_a_chain_makes_the_rest_worthless():
    index = FreeIndex(SIZE)
    index.add(10, 30, stamp=5)
    index.cut(10, 14, evict=True)
    assert index.at(14).stamp == index.at(29).stamp == WORTHLESS


def test_evicting_the_tail_leaves_the_head():
    index = FreeIndex(SIZE)
    index.add(10, 30, stamp=5)
    index.cut(25, 30, evict=True)
    assert index.at(10).stamp == index.at(24).stamp == 5


def test_worthless_neighbours_are_one_extent():
    index = FreeIndex(SIZE)
    for start in (0, 20, 10):
        index.add(start, start + 10, WORTHLESS)
    assert [len(extent) for extent in index.extents()] == [30]


def test_seeds_come_best_fit_first_and_oldest_first():
    index = FreeIndex(SIZE)
    for start, stop, stamp in ((0, 4, 9), (5, 9, 3), (10, 20, 2), (21, 50, 1)):
        index.add(start, stop, stamp)
    assert [extent.start for extent in index.seeds(5, each=4)] == [5, 0, 10, 21]


def test_ages_are_told_within_one_band():
    rng = random.Random(1)
    bands, stamps, clock = AgeBands(1000), [], 1
    for _ in range(5000):
        clock += rng.randint(1, 30)
        bands.add(clock, 1)
        stamps.append(clock)
        if len(stamps) > 100:
            bands.add(stamps.pop(rng.randrange(20)), -1)
    width = 1000 // 128
    for stamp in (stamp for stamp in stamps if stamp > clock - 100 * width):
        ahead = bands.ahead_of(stamp)
        older = [other for other in stamps if other < stamp]
        assert sum(other < stamp - width for other in older) <= ahead <= len(older)
