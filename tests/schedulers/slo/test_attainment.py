"""The three rules of attainment."""

from __future__ import annotations

import pytest

from penstock.schedulers.slo.attainment import Attainment, attains
from penstock.schedulers.slo.targets import Targets, Tiers

TARGETS = Targets(1.0, 0.1)


@pytest.mark.parametrize(
    ("times_s", "cumulative", "mean", "gap"),
    [
        ([0.9, 1.0, 1.1, 1.2], True, True, True),
        ([1.1, 1.2, 1.3], False, False, False),
        ([0.2, 0.25, 0.3, 1.2], True, False, False),
        ([0.9, 0.91, 1.1], True, True, False),
        ([0.1, 0.2, 0.5, 0.6], True, False, False),
        ([1.0, 1.2, 1.2, 1.3], False, True, False),
        ([1.0], True, True, True),
        ([], False, False, False),
    ],
)
def test_a_request_attains_by_every_rule_what_that_rule_says(times_s, cumulative, mean, gap):
    assert attains(TARGETS, 0.0, times_s, "cumulative") is cumulative
    assert attains(TARGETS, 0.0, times_s, "mean") is mean
    assert attains(TARGETS, 0.0, times_s, "gap") is gap


def test_long_prompts_that_miss_show_in_the_share_of_tokens_and_in_their_tier():
    attainment = Attainment(Tiers((0.05, 0.1)))
    for _ in range(9):
        attainment.add(Targets(1.0, 0.05), 0.0, 99, [0.5])
    attainment.add(Targets(1.0, 0.1), 0.0, 8099, [1.5])
    total = attainment.total["cumulative"]
    assert (total.share, total.token_share) == (0.9, 0.1)
    assert [tally.share for tally in attainment.by_tier["cumulative"]] == [1.0, 0.0]
