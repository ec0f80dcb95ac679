"""Draft lengths against trying all, estimates against counting, and when drafts are left out."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest
from counted_acceptance import CountedAcceptance

from penstock.schedulers.acceptance_table import NOBODY, AcceptanceTable
from penstock.schedulers.draft_config import SpeculationConfig
from penstock.schedulers.draft_lengths import DraftLengths, fastest_lengths, rates_by_depth, worth
from penstock.schedulers.drafts import Besides, Drafts, displaced_prompts
from penstock.schedulers.slo.profiles import Profile
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel


def ints(*values):
    return np.array(values, dtype=np.int64)


def draft_lengths(most):
    return DraftLengths(most, spare_worth=0.5, least_gain=0.01, probe_share=0.01)


def random_batch(seed):
    rng = random.Random(seed)
    rows, most = rng.randint(1, 4), rng.randint(1, 3)
    survival = np.cumprod(
        [[rng.choice((rng.random(), 0.8, 1.0)) for _ in range(most)] for _ in range(rows)], 1
    )
    needed = np.array([rng.choice((0.0, math.inf, rng.uniform(1, 4))) for _ in range(rows)])
    base, token, knee, steep = rng.uniform(0.5, 3), rng.choice((0.02, 0.3)), rng.randint(0, 6), rng.random()
    tokens = np.arange(rng.randint(0, rows * most) + 1)
    return survival, needed, base + token * tokens + steep * np.maximum(0, tokens - knee)


@pytest.mark.parametrize("seed", range(100))
def test_no_other_lengths_have_more_worth_a_second(seed):
    survival, needed, seconds = random_batch(seed)
    sure = 0.5 * len(survival)
    values = worth(survival, needed, 0.5)
    found = fastest_lengths(values, np.full(len(seconds), sure), seconds)

    def rate(lengths):
        value = sure + sum(values[row, :length].sum() for row, length in enumerate(lengths))
        return value / seconds[sum(lengths)]

    every = product(range(survival.shape[1] + 1), repeat=len(survival))
    best = max(rate(lengths) for lengths in every if sum(lengths) < len(seconds))
    assert math.isclose(rate(found.lengths.tolist()), best, rel_tol=1e-9)
    assert math.isclose(found.gain, best * seconds[0] / sure - 1, abs_tol=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_a_pass_is_worth_what_all_requests_gain_by_it(seed):
    survival, needed, seconds = random_batch(seed)
    values, pass_s = worth(survival, needed, 0.5), 0.2
    sure = 0.5 * len(survival)

    def best(depth):
        every = product(range(depth + 1), repeat=len(survival))
        return max(
            (sure + sum(values[row, :length].sum() for row, length in enumerate(lengths)))
            / (seconds[sum(lengths)] + pass_s * (depth - 1))
            for lengths in every
            if sum(lengths) < len(seconds)
        )

    found = rates_by_depth(values, np.full(len(seconds), sure), seconds, pass_s)
    np.testing.assert_allclose(found, [best(depth + 1) for depth in range(survival.shape[1])])


@pytest.mark.parametrize(("pass_s", "depth"), [(1e-5, 4), (0.05, 1)])
def test_the_drafter_is_asked_for_no_more_passes_than_pay(pass_s, depth):
    model = StepTimeModel(Profile(base_s=0.02, token_s=1e-6, pass_s=pass_s))
    drafts = Drafts(SpeculationConfig(probe_share=0.0), 4, model, in_passes=True)
    rows, nothing = ints(*(drafts.row(f"r{i}", "c") for i in range(4))), np.full(4, np.inf)
    drafts.choose(rows, np.zeros(4, dtype=np.int64), nothing, nothing, Besides(4, 0, 64, 64, 4, 100))
    assert drafts.depth == depth


@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.9])
def test_where_only_the_pace_counts_lengths_are_those_of_slos_serve(acceptance):
    """Tier k verifies the fewest tokens s with Acc(s) >= T / tpot_k, T = Acc(j) * tpot of the tightest."""
    tpots, most = np.array((0.05, 0.1, 0.25)), 15
    survival = np.tile(acceptance ** np.arange(1, most + 1), (3, 1))
    for j in range(1, 6):
        length_s = (1 - acceptance**j) / (1 - acceptance) * tpots[0]
        values = worth(survival, length_s / tpots, 0.0)
        # A step so long that the time of a draft token is nothing.
        found = fastest_lengths(values, np.ones(3 * most + 1), 1.0 + 1e-12 * np.arange(3 * most + 1))
        share = ((tpots - tpots[0]) + acceptance**j * tpots[0]) / tpots
        formula = np.maximum(1, np.ceil(np.log(share) / math.log(acceptance) - 1e-9))
        assert list(1 + found.lengths) == list(formula)


@pytest.mark.parametrize(("slack_s", "longer"), [(0.02, True), (0.5, False)])
def test_a_request_with_no_slack_gets_the_longer_draft(slack_s, longer):
    drafts = Drafts(SpeculationConfig(probe_share=0.0), 4, StepTimeModel(Profile(base_s=0.02, token_s=3e-3)))
    rows = ints(drafts.row("a", "c"), drafts.row("b", "c"))
    besides = Besides(2, 0, 64, 64, 2, 100)
    found = drafts.choose(rows, ints(4, 4), np.array([slack_s, 0.5]), np.full(2, 0.02), besides)
    assert (found[0] > found[1]) == longer


def test_drafts_end_with_the_room_of_the_step_and_prompts_give_way():
    drafts = Drafts(SpeculationConfig(probe_share=0.0), 4, StepTimeModel(Profile(base_s=0.02, token_s=1e-6)))
    rows = ints(*(drafts.row(f"r{i}", "c") for i in range(4)))
    drafts.learn(rows, ints(4, 4, 4, 4), ints(4, 4, 4, 4))
    besides = Besides(4, 1000, 8, 10, 4, 100)
    assert list(displaced_prompts(besides, np.arange(7))) == [0, 1, 2, 3, 4, 4, 4]
    found = drafts.choose(rows, np.full(4, 4), np.full(4, 0.01), np.full(4, 0.01), besides)
    assert 0 < found.sum() <= 6


def test_a_draft_that_leaves_prompts_no_room_is_worth_less_than_they_are():
    values = np.array([[0.15, 0.1], [0.9, 0.5]])
    rest = 10.0 - 0.2 * np.arange(5)
    assert list(fastest_lengths(values, rest, np.ones(5)).lengths) == [0, 2]


def test_an_estimate_goes_from_the_prior_to_the_class_to_the_request():
    table = AcceptanceTable(4)
    a, b = table.row("a", "chat"), table.row("b", "chat")
    before = table.survival(ints(a))[0]
    for number in range(400):
        table.observe(ints(table.row(f"x{number}", "chat")), ints(4), ints(4))
        table.forget(f"x{number}")
    assert (table.survival(ints(a))[0] > before).all()
    for _ in range(50):
        table.observe(ints(a), ints(4), ints(0))
    assert table.survival(ints(a))[0, 0] < 0.3 < 0.8 < table.survival(ints(b))[0, 0]


@pytest.mark.parametrize(("together", "tolerance"), [(1, 1e-9), (12, 0.03)])
@pytest.mark.parametrize("seed", range(10))
def test_the_table_estimates_what_the_estimator_does(seed, together, tolerance):
    rng = random.Random(seed)
    table, estimator = AcceptanceTable(4), CountedAcceptance(4)
    classes = {f"r{i}": rng.choice("abc") for i in range(80)}
    for _ in range(150):
        step = rng.sample(sorted(classes), rng.randint(0, together))
        drafted = [rng.randint(0, 6) for _ in step]
        accepted = [rng.randint(0, most) for most in drafted]
        rows = ints(*(table.row(name, classes[name]) for name in step))
        table.observe(rows, ints(*drafted), ints(*accepted))
        for name, tokens, right in zip(step, drafted, accepted, strict=True):
            estimator.observe(name, classes[name], tokens, right)
        table.check_integrity()
    names = [name for name in classes if table.find([name])[0] != NOBODY]
    rows = ints(*(table.row(name, classes[name]) for name in names))
    for name, row in zip(names, table.survival(rows), strict=True):
        np.testing.assert_allclose(row, estimator.survival(name, classes[name]), rtol=tolerance)


def test_a_row_is_given_to_another_request_without_what_was_learned_in_it():
    table = AcceptanceTable(2)
    row = table.row("a", "x")
    before = table.survival(ints(row)).copy()
    for _ in range(50):
        table.observe(ints(row), ints(2), ints(0))
    table.forget("a")
    assert table.row("b", "y") == row
    np.testing.assert_allclose(table.survival(ints(row)), before)


def test_classes_without_end_do_not_take_memory_without_end():
    table = AcceptanceTable(2)
    for number in range(1000):
        table.row(f"r{number}", f"c{number}")
        table.forget(f"r{number}")
    table.check_integrity()
    assert len(table) == 0


def test_more_accepted_than_drafted_is_refused():
    with pytest.raises(ValueError, match="accepted"):
        AcceptanceTable(2).observe(ints(0), ints(1), ints(2))


def serve(policy, rate, seconds, steps, requests=8):
    """Steps that draft as told; returns the time with drafts, the tokens, and the time without."""
    rng = random.Random(0)
    rows = ints(*(policy.table.row(f"r{i}", "c") for i in range(requests)))
    spent = plain = tokens = 0.0
    for _ in range(steps):
        rest = np.full(len(seconds), 0.5 * requests)
        full = np.full(requests, policy.table.most_tokens)
        lengths = policy.lengths(rows, full, np.zeros(requests), rest=rest, seconds=seconds)
        accepted = ints(*(next((k for k in range(n) if rng.random() >= rate), n) for n in lengths))
        drafted = lengths > 0
        policy.table.observe(rows[drafted], lengths[drafted], accepted[drafted])
        spent += seconds[lengths.sum()]
        plain += seconds[0]
        tokens += requests + accepted.sum()
    return spent, tokens, plain


def test_drafts_that_are_never_accepted_are_turned_off_and_probing_costs_a_percent():
    policy, seconds = draft_lengths(4), 0.025 + 7e-4 * np.arange(33)
    serve(policy, 0.0, seconds, 200)
    spent, _, plain = serve(policy, 0.0, seconds, 1000)
    assert spent <= plain * 1.01 + seconds[2] - seconds[0]
    assert policy.probes > 0
    assert policy.probing_s <= 0.01 * policy.served_s


def test_drafts_come_back_when_they_begin_to_pay():
    policy, seconds = draft_lengths(4), 0.025 + 7e-4 * np.arange(33)
    serve(policy, 0.0, seconds, 500)
    serve(policy, 0.95, seconds, 3000)
    spent, tokens, plain = serve(policy, 0.95, seconds, 500)
    assert tokens / spent > 1.5 * (8 * 500) / plain


def test_no_row_gets_more_tokens_than_there_are():
    policy = draft_lengths(4)
    rows = ints(*(policy.table.row(f"r{i}", "c") for i in range(3)))
    found = policy.lengths(
        rows, ints(1, 4, 2), np.full(3, np.inf), rest=np.full(8, 1.5), seconds=np.full(8, 0.01)
    )
    assert list(found) == [1, 4, 2]


def test_times_of_many_sizes_are_those_of_each_one():
    model = StepTimeModel(
        Profile(base_s=0.01, token_s=1e-5, knees_s=(1e-5, 2e-5), request_s=1e-6, context_s=1e-9)
    )
    tokens = np.arange(1, 4000, 37)
    plain_s = model.seconds(StepFeatures(0, 8, 1000)) + model.token_s * tokens
    found = plain_s + model.knee_seconds(tokens)
    expected = [model.seconds(StepFeatures(int(number), 8, 1000)) for number in tokens]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
