"""Targets, deadlines and tiers."""

from __future__ import annotations

import math

import pytest

from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.targets import TargetError, Targets, Tiers


def test_deadlines_are_cumulative_so_that_early_tokens_bank_slack():
    targets = Targets(1.0, 0.1)
    assert [targets.due_s(10.0, i) for i in (0, 1, 20)] == [11.0, 11.1, 13.0]
    assert targets.due_s(10.0, 20, first_token_s=10.2) == 13.0


def test_a_late_first_token_moves_the_ones_behind_it():
    assert Targets(1.0, 0.1).due_s(10.0, 5, first_token_s=12.0) == 12.5


def test_what_is_not_asked_for_is_never_due():
    assert Targets(ttft_s=1.0).due_s(0.0, 5) == math.inf
    assert Targets(tpot_s=0.1).due_s(0.0, 0) == math.inf
    assert Targets(tpot_s=0.1).due_s(0.0, 5, first_token_s=2.0) == 2.5
    assert Targets(tpot_s=0.1).due_s(0.0, 5) == math.inf


@pytest.mark.parametrize("value", [0, -1, math.nan, "1", True, None])
@pytest.mark.parametrize("name", ["ttft_s", "tpot_s"])
def test_a_target_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(TargetError, match=name):
        Targets(**{name: value})


def test_targets_that_ask_for_nothing_are_refused():
    with pytest.raises(TargetError, match="both are infinite"):
        Targets()


def test_a_request_joins_the_slowest_tier_that_is_no_slower_than_it_asks_for():
    tiers = Tiers((0.025, 0.05, 0.1))
    asked = (0.01, 0.025, 0.04, 0.05, 0.2, math.inf)
    assert [tiers.index(tpot) for tpot in asked] == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("tiers", [(), (0.1, 0.05), (0.0, 0.1), (0.1, math.inf), (0.1, 0.1)])
def test_tiers_that_do_not_ascend_are_refused(tiers):
    with pytest.raises(ValueError, match="tiers"):
        SLOConfig(tiers_s=tiers)
