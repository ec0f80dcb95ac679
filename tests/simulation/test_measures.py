"""Measures against values worked out by hand."""

from __future__ import annotations

from array import array

import pytest
from scripted_engine import ask

from penstock.simulation.measures import (
    attainment,
    hit_rate,
    jain,
    meets_tpot,
    meets_ttft,
    percentile,
    throughput,
    ttfts,
)
from penstock.simulation.records import Served


def served(times, *, arrival=0.0, prompt=100, cached=0, finished=True, **more):
    one = Served(ask("a", arrival, prompt=prompt, output=len(times) or 1, **more), prompt)
    one.token_times = array("d", times)
    one.cached_tokens, one.extend_tokens = cached, prompt - cached
    one.finished_s = times[-1] if finished and times else None
    return one


@pytest.mark.parametrize(
    ("shares", "index"), [([5, 5, 5], 1.0), ([1, 0, 0, 0], 0.25), ([1, 3], 0.8), ([0, 0], 1.0)]
)
def test_jain(shares, index):
    assert jain(shares) == pytest.approx(index)


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 3), (0.6, 3), (0.61, 4), (0.99, 5), (1.0, 5)])
def test_percentile_is_the_nearest_rank(share, value):
    assert percentile([5, 3, 1, 2, 4], share) == value


def test_throughput_and_hit_rate_count_whole_prompts():
    two = [served([1.0, 2.0], prompt=100, cached=75), served([4.0], prompt=300)]
    assert throughput(two, 4.0) == pytest.approx((400 + 3) / 4)
    assert hit_rate(two) == pytest.approx(75 / 400)


def test_ttft_is_by_client_from_arrival():
    got = ttfts([served([3.0], arrival=1.0, client="x"), served([], client="y"), served([2.5], client="x")])
    assert got == {"x": [2.0, 2.5]}


def test_a_ttft_target_is_met_to_the_millisecond():
    assert meets_ttft(served([0.5], ttft_slo_ms=500))
    assert not meets_ttft(served([0.501], ttft_slo_ms=500))
    assert meets_ttft(served([99.0]))
    assert not meets_ttft(served([0.1, 0.2], ttft_slo_ms=500, finished=False))


def times(first, *gaps):
    total = [first]
    for gap in gaps:
        total.append(total[-1] + gap)
    return total


CASES = {
    "even": (times(0.1, 0.1, 0.1, 0.1), (True, True, True)),
    "one long gap in the middle, made good": (times(0.1, 0.25, 0.02, 0.02), (True, True, False)),
    "late at the end": (times(0.1, 0.1, 0.1, 0.2), (False, False, False)),
    "late within the tolerance": (times(0.1, 0.1, 0.1, 0.11), (True, False, False)),
    "one token": ([0.1], (True, True, True)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_three_readings_of_a_tpot_target_of_100_ms(case):
    tokens, expected = CASES[case]
    one = served([round(time, 9) for time in tokens], tpot_slo_ms=100.001)
    assert tuple(meets_tpot(one, rule) for rule in ("deadline", "mean", "gap")) == expected


def test_a_first_token_ahead_of_its_deadline_banks_slack_for_the_cumulative_rule_alone():
    one = served([0.1, 0.7], ttft_slo_ms=500, tpot_slo_ms=200)
    assert meets_tpot(one, "deadline")
    assert not meets_tpot(one, "mean")


def test_the_cumulative_rule_looks_at_every_tenth_token_and_the_last():
    late_between = times(0.0, *[0.1] * 4, 1.0, *[0.0] * 10)
    late_at_ten = times(0.0, *[0.1] * 9, 1.0, *[0.0] * 20)
    assert meets_tpot(served(late_between, tpot_slo_ms=150), "deadline")
    assert not meets_tpot(served(late_at_ten, tpot_slo_ms=100), "deadline")


def test_attainment_is_by_tier_and_in_all_and_may_be_weighed():
    three = [
        served([0.1], tier="tight", ttft_slo_ms=200),
        served([0.3], tier="tight", ttft_slo_ms=200, prompt=300),
        served([0.3], tier="loose", ttft_slo_ms=900),
    ]
    assert attainment(three, "mean") == {"": pytest.approx(2 / 3), "tight": 0.5, "loose": 1.0}
    weighed = attainment(three, "mean", weigh=lambda one: one.prompt_tokens)
    assert weighed == {"": pytest.approx(0.4), "tight": pytest.approx(0.25), "loose": 1.0}
