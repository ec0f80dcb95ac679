"""When the next token of a running request is due under each pace."""

from __future__ import annotations

import math
import random

import msgspec
import pytest

from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.decodes import Columns
from penstock.schedulers.slo.lengths import OutputLengths
from penstock.schedulers.slo.pacing import Pacing
from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.targets import Targets

TARGETS = Targets(0.5, 0.05)


def pacing(*, length: int = 64, step_s: float = 0.03, **config):
    lengths = OutputLengths()
    for _ in range(400):
        lengths.observe("", length)
    found = Pacing(SLOConfig(**config), lengths)
    for _ in range(10):
        found.observe_step(step_s)
    return found


def fresh(output=1, first_token_s=0.2):
    return Running(
        request_id="a",
        arrival_s=0.0,
        tokens=100 + output,
        computed_tokens=99 + output,
        output_tokens=output,
        first_token_s=first_token_s,
        last_token_s=first_token_s,
    )


def test_by_the_mean_a_fresh_answer_lends_a_step_the_time_that_its_rest_makes_up_for():
    assert pacing(pace="mean").slack_s(fresh(), TARGETS, 0.2) == pytest.approx(0.1)
    assert pacing(pace="mean", lent_step_s=0.0).slack_s(fresh(), TARGETS, 0.2) == pytest.approx(0.05)


def test_an_answer_about_to_end_lends_what_is_left_of_it_and_no_more():
    rest = pacing(pace="mean", length=4, step_s=0.04).slack_s(fresh(output=2), TARGETS, 0.25)
    assert 0.05 < rest <= 0.05 + 2 * 0.01 + 1e-9


def test_an_engine_that_is_as_slow_as_the_pace_lends_nothing():
    assert pacing(pace="mean", step_s=0.05).slack_s(fresh(), TARGETS, 0.2) == pytest.approx(0.05)


@pytest.mark.parametrize(("pace", "slack"), [("cumulative", 0.35), ("gap", 0.05)])
def test_other_paces_lend_nothing(pace, slack):
    assert pacing(pace=pace).slack_s(fresh(), TARGETS, 0.2) == pytest.approx(slack)


def test_slack_that_was_banked_is_never_cut():
    banked = pacing(pace="mean").slack_s(fresh(output=20), TARGETS, 0.2)
    assert banked == pytest.approx(1.0)


@pytest.mark.parametrize("pace", ["mean", "cumulative", "gap"])
def test_slack_by_columns_is_the_slack_of_each(pace):
    rng = random.Random(pace)
    rule = pacing(pace=pace)
    requests = []
    for number in range(200):
        first_s = rng.choice((None, rng.uniform(0.0, 2.0)))
        running = msgspec.structs.replace(fresh(rng.randint(1, 200), first_s), request_id=str(number))
        running.targets = Targets(rng.choice((0.5, math.inf)), rng.choice((0.02, 0.05, 0.25)))
        running.last_token_s = None if first_s is None else first_s + rng.random()
        requests.append(running)
    for start_s in (0.5, 3.0, 9.0):
        slacks = rule.slacks_s(Columns.of(requests, pace), start_s).tolist()
        assert slacks == [rule.slack_s(one, one.targets, start_s) for one in requests]


def lent_s(rule, requests, start_s=0.2):
    for running in requests:
        running.targets = TARGETS
    columns = Columns.of(requests, rule.pace)
    return rule.lent_s(columns, rule.slacks_s(columns, start_s))


def test_a_step_that_loses_no_answer_may_be_as_long_as_any():
    assert lent_s(pacing(pace="mean", lending="losses"), [fresh() for _ in range(40)]) == 0.2
    assert lent_s(pacing(pace="mean", lending="losses", longest_step_s=0.4), [fresh()]) == 0.4


@pytest.mark.parametrize(("number", "longest_s"), [(1, 0.2), (4, 0.2), (5, 0.06), (40, 0.06)])
def test_each_answer_that_ends_too_soon_has_its_price(number, longest_s):
    # Due in 0.05 s; two tokens to come make up for 0.01 s each.
    ending = pacing(pace="mean", length=4, step_s=0.04, lending="losses")
    assert lent_s(ending, [fresh(output=2) for _ in range(number)], 0.25) == pytest.approx(longest_s)


def test_where_steps_are_as_slow_as_the_pace_nothing_is_made_up_for():
    rule = pacing(pace="mean", step_s=0.05, lending="losses")
    assert lent_s(rule, [fresh() for _ in range(10)]) == 0


def test_answers_whose_pace_is_lost_hold_up_nobody():
    ending = pacing(pace="mean", length=4, step_s=0.04, lending="losses")
    assert lent_s(ending, [fresh(output=2) for _ in range(40)], start_s=0.6) == 0.2


def test_other_paces_and_engines_that_pass_decodes_over_lend_no_step():
    for rule in (
        pacing(pace="cumulative", lending="losses", lost_answer_s=0.0),
        pacing(pace="gap", lending="losses", lost_answer_s=0.0),
    ):
        assert lent_s(rule, [fresh()]) == 0
    assert lent_s(pacing(pace="mean"), [fresh()]) == 0


def test_dearer_answers_never_lend_more():
    rng = random.Random(7)
    requests = [fresh(rng.randint(1, 120), rng.uniform(0.0, 2.0)) for _ in range(30)]
    for start_s in (0.5, 3.0, 6.0):
        prices_s = (0.0, 0.01, 0.05, 0.2, 1.0, 100.0)
        found = [
            lent_s(pacing(pace="mean", lending="losses", lost_answer_s=one), requests, start_s)
            for one in prices_s
        ]
        assert found == sorted(found, reverse=True)
        assert found[0] == 0.2
