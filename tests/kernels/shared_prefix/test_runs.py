"""Shared runs against all partitions and against counting; kept runs against runs looked for anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels.shared_prefix.runs import Run, RunKeeper, shared_runs


def arrays(tables):
    """Tables as an engine has them, with numbers of others behind each, and how many blocks each has."""
    full = np.array([len(table) for table in tables], np.int64)
    padded = np.full((len(tables), int(full.max(initial=0)) + 2), 7, np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded, full


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


def most_saved_by_groups(tables, least):
    """What disjoint groups of requests save at best, each reading one prefix once."""

    def saved(part):
        blocks = common([tables[request] for request in part])
        return (len(part) - 1) * blocks if blocks >= least else 0

    return max(sum(map(saved, found)) for found in partitions(list(range(len(tables)))))


# Few numbers and short tables: prefixes of every depth occur.
TABLES = st.lists(st.lists(st.integers(0, 1), max_size=4), max_size=5)


@given(TABLES, st.integers(1, 3), st.integers(2, 4))
def test_runs_are_blocks_that_their_requests_share_and_lie_behind_each_other(tables, least, requests):
    runs = shared_runs(*arrays(tables), least_blocks=least, least_requests=requests)
    ends = [0] * len(tables)
    for run in sorted(runs, key=lambda run: run.first):
        assert len(run.requests) >= requests
        assert run.last - run.first >= least
        assert run.last <= common([tables[request] for request in run.requests])
        for request in run.requests:
            # No gap and no block twice: what a request has is its runs and what is behind them.
            assert ends[request] == run.first
            ends[request] = run.last


@given(TABLES)
def test_every_block_is_read_once(tables):
    runs = shared_runs(*arrays(tables))
    distinct = {tuple(table[: place + 1]) for table in tables for place in range(len(table))}
    assert sum(map(len, tables)) - sum(run.saved for run in runs) == len(distinct)


@given(TABLES, st.integers(1, 3))
def test_prefixes_within_prefixes_save_at_least_what_groups_do_but_for_short_ends(tables, least):
    runs = shared_runs(*arrays(tables), least_blocks=least)
    # Of each run above, up to ``least - 1`` blocks of those that go on are left to each.
    slack = 0 if least == 1 else (least - 1) * len(tables)
    assert sum(run.saved for run in runs) >= most_saved_by_groups(tables, least) - slack


def test_what_a_deeper_prefix_has_beyond_a_shallow_one_is_a_run_of_its_own():
    deep = list(range(100))
    tables = [[*deep, 1], [0, 1, 2, 3, 4, 700], [*deep, 2], [0, 1, 2, 3, 4, 800]]
    assert sorted(shared_runs(*arrays(tables)), key=lambda run: run.first) == [
        Run((0, 1, 2, 3), 0, 5),
        Run((0, 2), 5, 100),
    ]
    assert shared_runs(*arrays(tables), least_blocks=10) == [Run((0, 2), 0, 100)]
    assert shared_runs(*arrays(tables), least_requests=3) == [Run((0, 1, 2, 3), 0, 5)]


def test_blocks_that_are_not_full_are_not_shared():
    tables = np.array([[1, 2, 3], [1, 2, 3]], np.int32)
    assert shared_runs(tables, np.array([2, 3])) == [Run((0, 1), 0, 2)]
    assert shared_runs(tables, np.array([0, 3])) == []


@pytest.mark.parametrize("kind", ["a ladder of prefixes", "one prefix", "none"])
def test_many_requests_are_searched_in_bounded_steps(kind, monkeypatch):
    """256 requests of 256 blocks: the number of ranges that are looked at is linear, whatever they share."""
    from penstock.kernels.shared_prefix import runs

    count = 256
    tables = np.arange(count * count, dtype=np.int32).reshape(count, count)
    if kind == "a ladder of prefixes":
        # Request r has r blocks of the longest one.
        tables = np.where(np.arange(count) < np.arange(count)[:, None], tables[:1], tables)
    elif kind == "one prefix":
        tables[:, :200] = tables[0, :200]
    looked = []
    minimum = np.ndarray.min

    class Counted(np.ndarray):
        def min(self, *arguments, **keywords):
            looked.append(len(self))
            return minimum(self, *arguments, **keywords)

    shared = runs._shared
    monkeypatch.setattr(runs, "_shared", lambda *given: shared(*given).view(Counted))
    found = shared_runs(tables, np.full(count, count))
    assert len(looked) <= count
    assert (
        sum(run.saved for run in found)
        == {
            "a ladder of prefixes": sum(range(count)),
            "one prefix": 255 * 200,
            "none": 0,
        }[kind]
    )


@st.composite
def histories(draw):
    """Batches of a few requests, of which some get blocks of their own and some are replaced from step to
    step; a replacement takes blocks of others, as a cached prefix does."""
    fresh = iter(range(100, 1000))
    batch = [[0, 1, next(fresh)], [0, 1, next(fresh)], [0, next(fresh)]]
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        change = draw(st.sampled_from(["grow", "grow", "replace", "leave", "come", "swap"]))
        place = draw(st.integers(0, max(0, len(batch) - 1)))
        if change == "grow":
            batch = [[*table, next(fresh)] if draw(st.booleans()) else table for table in batch]
        elif change == "leave" and len(batch) > 1:
            batch = [table for number, table in enumerate(batch) if number != place]
        elif change == "swap":
            batch = [*batch[1:], batch[0]]
        else:
            source = draw(st.sampled_from(batch))
            table = [*source[: draw(st.integers(0, len(source)))], next(fresh)]
            batch = [*batch[:place], table, *batch[place + (change == "replace") :]]
        steps.append([list(table) for table in batch])
    return steps


@given(histories())
def test_kept_runs_are_those_that_a_search_finds(steps):
    keeper = RunKeeper(least_blocks=1, least_requests=2)
    for tables in steps:
        assert keeper.runs(*arrays(tables)) == shared_runs(*arrays(tables))


def test_one_that_takes_the_row_of_another_and_shares_more_is_seen():
    keeper = RunKeeper(least_blocks=1, least_requests=2)
    for tables in ([[3, 4], [3]], [[3, 4, 5], [3]], [[3, 4, 5, 6], [3, 4, 7]]):
        assert keeper.runs(*arrays(tables)) == shared_runs(*arrays(tables))


def test_blocks_that_are_added_behind_start_no_search():
    keeper = RunKeeper(least_blocks=1, least_requests=2)
    tables = [[0, 1, 5], [0, 1, 6]]
    for step in range(5):
        keeper.runs(
            *arrays([[*table, *range(100 * row, 100 * row + step)] for row, table in enumerate(tables, 1)])
        )
    assert keeper.searches == 1
    keeper.runs(*arrays([[0, 1, 5], [0, 1, 9]]))
    assert keeper.searches == 2
