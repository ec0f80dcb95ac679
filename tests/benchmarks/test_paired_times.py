"""Times of two ways on the same requests, and how sure their ratios are."""

from __future__ import annotations

import math
import random

from penstock.benchmarks.paired_times import median_share, tail_share


def test_a_share_is_that_of_single_requests_and_a_tail_s_that_of_all():
    theirs = [1.0, 10.0, 100.0, 1000.0]
    ours = [0.5, 4.0, 60.0, 300.0]
    assert median_share(ours, theirs).value == 0.45
    assert tail_share(ours, theirs, 0.99).value == 0.3


def test_equal_ratios_leave_no_doubt_and_a_seed_repeats_the_rest():
    theirs = [float(1 + number) for number in range(20)]
    assert median_share([0.5 * time for time in theirs], theirs) == (0.5, 0.5, 0.5)
    ours = [time * (0.2 + 0.05 * (number % 7)) for number, time in enumerate(theirs)]
    assert median_share(ours, theirs, 3) == median_share(ours, theirs, 3)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    draw = random.Random(0)
    held = 0
    for trial in range(60):
        theirs = [draw.uniform(1, 5) for _ in range(40)]
        share = median_share([time * draw.lognormvariate(-0.7, 0.3) for time in theirs], theirs, trial)
        held += share.low <= math.exp(-0.7) <= share.high
    assert held >= 50
