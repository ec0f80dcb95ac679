"""Grouping against all partitions, two levels against one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels.shared_prefix import PrefixGroup, cascade, prefix_groups


def common(tables):
    count = 0
    for column in zip(*tables, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for found in partitions(rest):
        yield [[first], *found]
        for place, part in enumerate(found):
            yield [*found[:place], [first, *part], *found[place + 1 :]]


def most_saved(tables, least):
    def saved(part):
        blocks = common([tables[request] for request in part])
        return (len(part) - 1) * blocks if blocks >= least else 0

    return max(sum(map(saved, found)) for found in partitions(list(range(len(tables)))))


# Few numbers and short tables: prefixes of every depth occur.
TABLES = st.lists(st.lists(st.integers(0, 1), max_size=4), max_size=5)


@given(TABLES, st.integers(1, 3))
def test_groups_save_as_much_as_any_partition(tables, least):
    groups = prefix_groups(tables, least)
    requests = [request for group in groups for request in group.requests]
    assert len(requests) == len(set(requests))
    for group in groups:
        assert len(group.requests) > 1
        assert least <= group.blocks <= common([tables[request] for request in group.requests])
    assert sum(group.saved for group in groups) == most_saved(tables, least)


def test_what_a_deeper_group_leaves_makes_one_of_its_own():
    deep = list(range(100))
    tables = [[*deep, 1], [0, 1, 2, 3, 4, 700], [*deep, 2], [0, 1, 2, 3, 4, 800]]
    assert prefix_groups(tables) == [PrefixGroup((0, 2), 100), PrefixGroup((1, 3), 5)]


@pytest.mark.parametrize("last", [1, 3])
def test_two_levels_are_one_attention(last):
    generator = torch.Generator().manual_seed(last)
    keys, values = (torch.randn(12, 4, 2, 8, generator=generator) for _ in range(2))
    query = torch.randn(4, 2, 3, 8, generator=generator)
    tables = [[0, 1, 2, 3], [0, 1, 4], [5, 6], [0, 1, 2]]
    lengths = [12 + last, 8 + last, 4 + last, 12]
    full = [table[: length // 4] for table, length in zip(tables, lengths, strict=True)]
    groups = prefix_groups(full)
    assert groups == [PrefixGroup((0, 1, 3), 2)]
    # The last request has nothing but one block of its own beyond the prefix; another has no group.
    flat, split = (cascade(query, keys, values, tables, lengths, found) for found in ([], groups))
    torch.testing.assert_close(split.output, flat.output)
    torch.testing.assert_close(split.lse, flat.lse)


def test_a_request_that_ends_with_the_prefix_has_an_empty_second_level():
    keys = torch.randn(3, 4, 1, 8)
    query = torch.randn(2, 1, 1, 8)
    tables, lengths = [[0, 1], [0, 1, 2]], [8, 9]
    flat = cascade(query, keys, keys, tables, lengths, [])
    split = cascade(query, keys, keys, tables, lengths, [PrefixGroup((0, 1), 2)])
    torch.testing.assert_close(split.output, flat.output)
