"""Plans of byte moves against a reference that copies byte by byte, for every kind of layout."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seeded import seeded

from penstock.connectors.geometry import CacheGeometry, LayerPages, Strip, plan_moves, strips_of
from penstock.connectors.runs import JointRun


@st.composite
def placements(draw, layout: str, num_layers: int, page: int):
    """Where one engine puts ``num_layers`` pages a block: (pages, blocks, bytes of the allocation)."""
    blocks = draw(st.integers(1, 12))
    offset = draw(st.sampled_from([0, 0, 5, 64]))
    match layout:
        case "BLHNC":
            pages = [LayerPages(num_layers, page, num_layers * page, page, offset)]
        case "LBHNC":
            pages = [LayerPages(num_layers, blocks * page, page, page, offset)]
        case "gaps":
            gap = draw(st.integers(1, 9))
            pages = [LayerPages(num_layers, page, num_layers * page + gap, page, offset)]
        case _:
            half = num_layers // 2
            split = offset + blocks * half * page
            pages = [
                LayerPages(num_layers - half, page, (num_layers - half) * page, page, split),
                LayerPages(half, page, half * page, page, offset),
            ]
    size = max(
        p.offset + (p.num_layers - 1) * p.layer_stride + (blocks - 1) * p.block_stride + p.page_bytes
        for p in pages
        if p.num_layers
    )
    return pages, blocks, size + draw(st.integers(0, 7))


def page_starts(pages: list[LayerPages], block: int) -> list[tuple[int, int]]:
    """(first byte, bytes) of a block's pages, in address order within the block's first occurrence."""
    placed = [
        (p.offset + layer * p.layer_stride, p.offset + layer * p.layer_stride + block * p.block_stride)
        for p in pages
        for layer in range(p.num_layers)
    ]
    return [(start, pages[0].page_bytes) for _, start in sorted(placed)]


def geometry_of(memory: np.ndarray, pages: list[LayerPages], blocks: int) -> CacheGeometry:
    return CacheGeometry(memory.ctypes.data, memory.nbytes, blocks, strips_of(pages))


@pytest.mark.parametrize(
    "layouts",
    [
        ("BLHNC", "BLHNC"),
        ("LBHNC", "LBHNC"),
        ("gaps", "gaps"),
        ("BLHNC", "gaps"),
        ("gaps", "BLHNC"),
        ("halves", "halves"),
        ("BLHNC", "LBHNC"),
    ],
    ids="-to-".join,
)
@seeded
@given(data=st.data(), num_layers=st.integers(1, 5), page=st.integers(1, 9))
def test_moves_copy_exactly_the_bytes_of_the_joint_runs(layouts, data, num_layers, page):
    source_pages, source_blocks, source_size = data.draw(placements(layouts[0], num_layers, page))
    target_pages, target_blocks, target_size = data.draw(placements(layouts[1], num_layers, page))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    source, target = (rng.integers(0, 256, n, dtype=np.uint8) for n in (source_size, target_size))
    expected = target.copy()
    joint, taken = [], 0
    for _ in range(data.draw(st.integers(0, 4))):
        if taken >= target_blocks:
            break
        at = data.draw(st.integers(0, source_blocks - 1))
        length = data.draw(st.integers(1, min(source_blocks - at, target_blocks - taken)))
        joint.append(JointRun(at, taken, length))
        for i in range(length):
            pairs = zip(page_starts(source_pages, at + i), page_starts(target_pages, taken + i), strict=True)
            for (s, width), (t, _) in pairs:
                for byte in range(width):
                    expected[t + byte] = source[s + byte]
        taken += length
    ours, theirs = (
        geometry_of(target, target_pages, target_blocks),
        geometry_of(source, source_pages, source_blocks),
    )
    if [strip.width for strip in ours.strips] != [strip.width for strip in theirs.strips]:
        with pytest.raises(ValueError, match="different pieces"):
            plan_moves(theirs, ours, joint)
        return
    moves = plan_moves(theirs, ours, joint)
    for s, t, length in zip(moves.source, moves.target, moves.length, strict=True):
        ctypes.memmove(int(t), int(s), int(length))
    assert (target == expected).all()
    assert moves.num_bytes == sum(run.length for run in joint) * num_layers * page
    if ours.extents_per_run and theirs.extents_per_run:
        assert len(moves) == len(joint) * ours.extents_per_run


@pytest.mark.parametrize("layout", ["BLHNC", "LBHNC", "gaps", "halves"])
@seeded
@given(data=st.data(), num_layers=st.integers(1, 6), page=st.integers(1, 9))
def test_strips_are_the_pages_and_nothing_else_in_the_fewest_pieces(layout, data, num_layers, page):
    pages, blocks, size = data.draw(placements(layout, num_layers, page))
    strips = strips_of(pages)
    for block in range(blocks):
        by_pages = sorted(b for start, n in page_starts(pages, block) for b in range(start, start + n))
        by_strips = [
            b
            for s in strips
            for b in range(s.offset + block * s.stride, s.offset + block * s.stride + s.width)
        ]
        assert sorted(by_strips) == by_pages
    for left, right in pairwise(strips):
        touching = left.offset + left.width == right.offset and left.stride == right.stride
        assert not touching or left.is_dense or left.width + right.width > left.stride
    assert CacheGeometry(0, size, blocks, strips).block_bytes == num_layers * page


@pytest.mark.parametrize(
    ("pages", "extents"),
    [
        (LayerPages(32, 4096, 32 * 4096, 4096), 1),
        (LayerPages(32, 1000 * 4096, 4096, 4096), 32),
        (LayerPages(32, 4096, 33 * 4096, 4096), None),
    ],
    ids=["BLHNC", "LBHNC", "gaps"],
)
def test_extents_a_run(pages, extents):
    assert CacheGeometry(0, 1 << 40, 1000, strips_of([pages])).extents_per_run == extents


def test_a_dense_run_is_one_move_however_long():
    pool = CacheGeometry(0, 1 << 40, 1 << 20, (Strip(0, 1 << 19, 1 << 19),))
    moves = plan_moves(pool, pool, [JointRun(0, 7, 1 << 19)])
    assert (len(moves), moves.num_bytes) == (1, 1 << 38)


@pytest.mark.parametrize(
    "run", [(-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 0, -1), (3, 0, 2), (0, 7, 2), (1 << 40, 0, 1)]
)
def test_a_run_outside_either_pool_is_refused(run):
    source = CacheGeometry(0, 4 * 16, 4, (Strip(0, 16, 16),))
    target = CacheGeometry(0, 8 * 16, 8, (Strip(0, 16, 16),))
    with pytest.raises(ValueError, match="leaves the pools of 4 and 8 blocks"):
        plan_moves(source, target, [JointRun(0, 0, 1), JointRun(*run)])


@pytest.mark.parametrize(
    "pages",
    [
        [LayerPages(2, 8, 64, 16)],
        [LayerPages(1, 0, 64, 16), LayerPages(1, 0, 64, 16, 15)],
        [LayerPages(1, 0, 8, 16)],
    ],
    ids=["layers overlap", "tensors overlap", "page above stride"],
)
def test_overlapping_pages_are_refused(pages):
    with pytest.raises(ValueError, match=r"overlap|does not fit"):
        strips_of(pages)


@pytest.mark.parametrize("strip", [Strip(-1, 16, 16), Strip(1, 16, 16), Strip(0, 17, 16), Strip(0, 16, 17)])
def test_a_strip_must_lie_in_the_allocation(strip):
    with pytest.raises(ValueError, match="of an allocation of 64 bytes"):
        CacheGeometry(0, 64, 4, (strip,))
