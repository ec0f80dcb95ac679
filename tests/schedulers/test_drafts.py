"""Draft lengths against trying every allocation, and the estimator against what it is shown."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from penstock.schedulers.acceptance import MOST_CLASSES, MOST_REQUESTS, AcceptanceEstimator
from penstock.schedulers.draft_policy import PROBE_SHARE, DraftPolicy
from penstock.schedulers.drafts import Drafting, allocate, fastest


def step_seconds(base, token, knee, steep, one_pass):
    def seconds(tokens, passes):
        return base + token * tokens + steep * max(0, tokens - knee) + one_pass * passes

    return seconds


def random_case(seed):
    rng = random.Random(seed)
    drafting = []
    for i in range(rng.randint(1, 4)):
        survival, reached = [], 1.0
        for _ in range(rng.randint(1, 4)):
            reached *= rng.choice((rng.random(), 0.8, 1.0))
            survival.append(reached)
        needed = rng.choice((math.inf, rng.uniform(1, 4)))
        worth = rng.choice((0.5, 1.0, 3.0))
        drafting.append(Drafting(f"r{i}", survival, worth, needed, rng.choice((0.0, 0.25))))
    seconds = step_seconds(
        rng.uniform(0.5, 3), rng.choice((0, 0.05, 0.3)), rng.randint(0, 6), rng.random(), rng.choice((0, 0.2))
    )
    return drafting, seconds, rng.randint(0, 10)


def allocations(drafting, most):
    for lengths in product(*(range(len(r.survival) + 1) for r in drafting)):
        if sum(lengths) <= most:
            yield lengths


def worth_of(drafting, lengths):
    return sum(sum(r.values(4)[:number]) for r, number in zip(drafting, lengths, strict=True))


def test_greedy_marginal_value_is_worth_what_the_best_allocation_is():
    for seed in range(400):
        drafting, seconds, most = random_case(seed)
        price = random.Random(seed).choice((0.1, 1.0, 3.0))
        best = max(
            worth_of(drafting, lengths) - price * (seconds(sum(lengths), max(lengths)) - seconds(0, 0))
            for lengths in allocations(drafting, most)
        )
        found = allocate(drafting, seconds, most_tokens=most, longest=4, price=price)
        lengths = [found.tokens.get(r.request_id, 0) for r in drafting]
        gain = worth_of(drafting, lengths) - price * (seconds(sum(lengths), max(lengths)) - seconds(0, 0))
        assert sum(lengths) <= most
        assert math.isclose(gain, best, abs_tol=1e-9), seed
        assert math.isclose(found.gain, best, abs_tol=1e-9), seed


def test_the_fastest_allocation_has_the_most_worth_a_second():
    for seed in range(300):
        drafting, seconds, most = random_case(seed)
        sure = sum(r.worth for r in drafting)
        best = max(
            (sure + worth_of(drafting, lengths)) / seconds(sum(lengths), max(lengths))
            for lengths in allocations(drafting, most)
        )
        found = fastest(drafting, seconds, most_tokens=most, longest=4)
        assert math.isclose((1 + found.gain) * sure / seconds(0, 0), best, rel_tol=1e-6), seed


@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.9])
def test_where_only_the_pace_counts_lengths_are_those_of_slos_serve(acceptance):
    """Tier k verifies the fewest tokens s with Acc(s) >= T / tpot_k, T = Acc(j) * tpot of the tightest."""

    def expected(tokens):
        return (1 - acceptance**tokens) / (1 - acceptance)

    tpots, most = (0.05, 0.1, 0.25), 15
    for j in range(1, 6):
        length_s = expected(j) * tpots[0]
        survival = [acceptance ** (k + 1) for k in range(most)]
        drafting = [Drafting(str(k), survival, 1.0, length_s / tpot) for k, tpot in enumerate(tpots)]
        found = allocate(drafting, lambda tokens, passes: 1.0, most_tokens=99, longest=most, price=1.0)
        for k, tpot in enumerate(tpots):
            share = ((tpot - tpots[0]) + acceptance**j * tpots[0]) / tpot
            formula = max(1, math.ceil(math.log(share, acceptance) - 1e-9))
            assert 1 + found.tokens.get(str(k), 0) == formula


def test_an_estimate_goes_from_the_prior_to_the_class_to_the_request():
    estimator = AcceptanceEstimator(4)
    before = estimator.survival("a", "chat")
    for i in range(400):
        estimator.observe(f"x{i}", "chat", 4, 4)
    shrunk = estimator.survival("a", "chat")
    assert all(left < right for left, right in zip(before, shrunk, strict=True))
    for _ in range(50):
        estimator.observe("a", "chat", 4, 0)
    assert estimator.survival("a", "chat")[0] < 0.3 < 0.8 < estimator.survival("b", "chat")[0]


def test_estimates_come_close_to_the_acceptance_at_each_position():
    rng = random.Random(1)
    rates = (0.9, 0.6, 0.3)
    estimator = AcceptanceEstimator(3)
    for _ in range(4000):
        accepted = 0
        while accepted < 3 and rng.random() < rates[accepted]:
            accepted += 1
        estimator.observe(f"r{rng.randrange(50)}", "c", 3, accepted)
    survival = estimator.survival("new", "c")
    for position, value in enumerate(survival):
        assert math.isclose(value, math.prod(rates[: position + 1]), abs_tol=0.06)
    assert list(survival) == sorted(survival, reverse=True)


def test_names_without_end_do_not_take_memory_without_end():
    estimator = AcceptanceEstimator(2)
    for i in range(MOST_REQUESTS + 500):
        estimator.observe(f"r{i}", f"c{i}", 2, 1)
    estimator.check_integrity()
    assert len(estimator._requests) == MOST_REQUESTS
    assert len(estimator._classes) == MOST_CLASSES


@pytest.mark.parametrize(("drafted", "accepted"), [(2, 3), (2, -1), (-1, 0)])
def test_a_report_that_cannot_be_is_refused(drafted, accepted):
    with pytest.raises(ValueError, match="accepted"):
        AcceptanceEstimator(4).observe("a", "c", drafted, accepted)


def serve(policy, rate, seconds, steps, requests=8, seed=0):
    """Steps that draft as told; returns the time with drafts, the tokens, and the time without."""
    rng = random.Random(seed)
    spent, tokens, plain = 0.0, 0, 0.0
    for _ in range(steps):
        drafting = [Drafting(str(i), policy.estimator.survival(str(i), "c")) for i in range(requests)]
        lengths = policy.lengths(drafting, seconds, most_tokens=64)
        spent += seconds(sum(lengths.values()), max(lengths.values(), default=0))
        plain += seconds(0, 0)
        tokens += requests
        for name, drafted in lengths.items():
            accepted = 0
            while accepted < drafted and rng.random() < rate:
                accepted += 1
            policy.observe(name, "c", drafted, accepted)
            tokens += accepted
    return spent, tokens, plain


def test_drafts_that_are_never_accepted_are_turned_off_and_probing_costs_a_percent():
    policy = DraftPolicy(4)
    seconds = step_seconds(0.025, 7e-4, 0, 0, 0)
    serve(policy, 0.0, seconds, 200)
    spent, _, plain = serve(policy, 0.0, seconds, 1000)
    one_probe_s = seconds(2, 2) - seconds(0, 0)
    assert spent <= plain * (1 + PROBE_SHARE) + one_probe_s
    assert policy.probing_s <= PROBE_SHARE * policy.served_s
    assert policy.probes > 0


def test_drafts_come_back_when_they_begin_to_pay():
    policy = DraftPolicy(4)
    seconds = step_seconds(0.025, 7e-4, 0, 0, 0)
    serve(policy, 0.0, seconds, 500)
    serve(policy, 0.95, seconds, 8000)
    spent, tokens, plain = serve(policy, 0.95, seconds, 500)
    assert tokens / spent > 1.5 * (8 * 500) / plain


def test_drafts_in_a_step_where_tokens_are_dear_are_none():
    policy = DraftPolicy(4)
    drafting = [Drafting("a", [0.5, 0.25, 0.1, 0.05])]
    assert policy.lengths(drafting, step_seconds(0.001, 0.01, 0, 0, 0), most_tokens=8) == {}
