"""The bench of picks gives a row a policy and size, and leaves the interpreter as it was."""

from __future__ import annotations

import gc

import pytest

from penstock.benchmarks.scheduler_picks import OPERATIONS, POLICIES, time_picks


def test_there_is_a_row_for_each_policy_and_size():
    rows = time_picks(sizes=(20, 50), operations=8)
    assert [(row["policy"], row["waiting"]) for row in rows] == [(p, n) for p in POLICIES for n in (20, 50)]
    assert all(row[f"us_per_{operation}"] >= 0 for row in rows for operation in OPERATIONS)
    assert gc.isenabled()


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="policy is 'sjf'"):
        time_picks(sizes=(20,), operations=8, policies=("sjf",))
    assert gc.isenabled()
