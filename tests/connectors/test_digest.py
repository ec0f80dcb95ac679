"""Digests: the same bytes have the same digest wherever they lie, and any other byte changes it."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seeded import seeded
from two_engines import CONFIG, Pool, Site, blocks_handed_off

from penstock.connectors.digest import SAMPLE_EVERY, DramDigester, sampled_positions
from penstock.connectors.errors import DigestMismatchError


def pool(layout: str) -> Pool:
    return Pool(random.Random(0), 16, layout, 1)


@pytest.mark.parametrize("layouts", [("BLHNC", "gaps"), ("LBHNC", "LBHNC")])
def test_a_digest_follows_the_bytes_and_not_the_place(layouts):
    one, two = (pool(layout) for layout in layouts)
    for block in range(8):
        one.write(block, key=block)
        two.write(15 - block, key=block)
    ours = DramDigester(one.geometries[0]).digests(range(8))
    theirs = DramDigester(two.geometries[0]).digests([15 - block for block in range(8)])
    assert (ours == theirs).all()
    assert len(set(ours.tolist())) == 8


@seeded
@given(layout=st.sampled_from(["BLHNC", "LBHNC", "gaps"]), block=st.integers(0, 15), data=st.data())
def test_every_byte_of_every_strip_counts_and_no_other(layout, block, data):
    one = pool(layout)
    digester = DramDigester(one.geometries[0])
    before = digester.digests(range(16))
    at = data.draw(st.integers(0, one.memories[0].nbytes - 1))
    one.memories[0][at] ^= data.draw(st.integers(1, 255))
    changed = [b for b in range(16) if digester.digests([b])[0] != before[b]]
    owners = [
        b for b in range(16) for s in one.geometries[0].strips if 0 <= at - s.offset - b * s.stride < s.width
    ]
    assert changed == owners


def test_exchanged_strips_and_blocks_are_told_apart():
    one = pool("LBHNC")
    one.write(3, key=1)
    one.write(4, key=2)
    digester = DramDigester(one.geometries[0])
    before = digester.digests([3, 4]).tolist()
    assert digester.digests([4, 3]).tolist() == before[::-1]
    (a, b, _c) = one.geometries[0].strips
    memory = one.memories[0]
    first = memory[a.offset + 3 * a.stride :][: a.width].copy()
    memory[a.offset + 3 * a.stride :][: a.width] = memory[b.offset + 3 * b.stride :][: b.width]
    memory[b.offset + 3 * b.stride :][: b.width] = first
    assert digester.digests([3])[0] != before[0]


@given(st.integers(0, 200))
@seeded
def test_sampled_positions(count):
    assert sampled_positions(count, "off") == []
    assert sampled_positions(count, "full") == list(range(count))
    sampled = sampled_positions(count, "sampled")
    assert sampled == sorted(set(sampled))
    assert set(sampled) == ({*range(0, count, SAMPLE_EVERY)} | {count - 1} if count else set())


@pytest.mark.parametrize("first", [0, 5])
def test_sampling_detects_a_wrong_byte_in_sampled_positions_only(first):
    """What sampling promises, and what it does not: a wrong block between two samples goes unseen."""
    keys = list(range(40))
    for position in range(first, 40):
        site = Site(msgspec.structs.replace(CONFIG, digest="sampled"), checks_bytes=False)
        site.decode.cache = {}
        for key in keys[:first]:
            (site.decode.cache[key],) = site.decode.pool.allocate(1)
            site.decode.pool.write(site.decode.cache[key], key)
        hand_off = site.prefill.prefill(keys)
        site.prefill.pool.write(blocks_handed_off(hand_off)[position], key=777)
        request_id = site.decode.pull(hand_off, keys)
        site.run()
        error = site.decode.error_of(request_id)
        assert (position in sampled_positions(40, "sampled")) == isinstance(error, DigestMismatchError)
        if error:
            assert f"the first at position {position}" in str(error)


def test_full_digests_detect_a_wrong_byte_at_every_position():
    keys = list(range(17))
    for position in range(17):
        site = Site()
        hand_off = site.prefill.prefill(keys)
        block = blocks_handed_off(hand_off)[position]
        strip = site.prefill.pool.geometries[0].strips[0]
        site.prefill.pool.memories[0][strip.offset + block * strip.stride + position] ^= 1
        request_id = site.decode.pull(hand_off, keys)
        site.run()
        assert f"1 of 17 blocks differ, the first at position {position}" in str(
            site.decode.error_of(request_id)
        )
        site.check()
