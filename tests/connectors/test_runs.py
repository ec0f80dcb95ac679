"""Runs and their join, against the definition block by block."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.connectors.runs import JointRun, Run, blocks_of, count_blocks, join_runs, runs_of, slice_runs

block_lists = st.lists(st.integers(0, 60), unique=True, max_size=40)


@given(block_lists)
def test_runs_expand_to_the_blocks_and_are_maximal(blocks):
    runs = runs_of(blocks)
    assert list(blocks_of(runs)) == blocks
    assert count_blocks(runs) == len(blocks)
    assert all(left.stop != right.start for left, right in pairwise(runs))


@given(block_lists, st.data())
def test_slice_is_the_slice_of_the_blocks(blocks, data):
    first = data.draw(st.integers(0, len(blocks)))
    count = data.draw(st.integers(0, len(blocks) - first))
    assert list(blocks_of(slice_runs(runs_of(blocks), first, count))) == blocks[first : first + count]


def test_a_slice_past_the_end_is_refused():
    with pytest.raises(ValueError, match="runs end 1 blocks before position 4"):
        slice_runs([Run(7, 3)], 1, 3)


@given(block_lists, st.data())
def test_joint_runs_break_exactly_where_either_side_breaks(source, data):
    target = data.draw(st.permutations(range(100, 100 + len(source))))
    joint = join_runs(runs_of(source), runs_of(target))
    pairs = [(run.source + i, run.target + i) for run in joint for i in range(run.length)]
    assert pairs == list(zip(source, target, strict=True))
    breaks = sum(
        source[i] != source[i - 1] + 1 or target[i] != target[i - 1] + 1 for i in range(1, len(source))
    )
    assert len(joint) == breaks + bool(source)


def test_sides_of_different_length_are_refused():
    with pytest.raises(ValueError, match="source has 2 blocks, target has 3"):
        join_runs([Run(0, 2)], [Run(5, 3)])


def test_one_run_on_both_sides_is_one_joint_run():
    assert join_runs([Run(4, 9)], [Run(40, 9)]) == [JointRun(4, 40, 9)]
