"""The step-time model: its inverse, and how it learns from good and bad measurements."""

from __future__ import annotations

import math
import random
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.schedulers.slo.nonnegative import solve
from penstock.schedulers.slo.profiles import Profile, find_profile, shipped_profiles
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel

TRUTH = Profile(base_s=0.02, token_s=4e-5, knees_s=(2e-5, 1e-5), request_s=2e-5, context_s=6e-8, pass_s=2e-3)
costs = st.sampled_from([0.0, 1e-5, 7e-5, 1e-3])


def scaled(factor):
    base, token, knee1, knee2, request, context, one_pass = (factor * c for c in TRUTH.coefficients)
    return Profile(
        base_s=base,
        token_s=token,
        knees_s=(knee1, knee2),
        request_s=request,
        context_s=context,
        pass_s=one_pass,
    )


def some_step(rng):
    requests = rng.randint(1, 200)
    tokens = requests + rng.choice((0, 0, rng.randint(0, 600), rng.randint(0, 4000)))
    return StepFeatures(tokens, requests, requests * rng.randint(100, 3000), rng.choice((0, 0, 4)))


def teach(model, steps, *, seed=0, noise=0.05, truth=TRUTH, outliers=0.0):
    rng = random.Random(seed)
    exact = StepTimeModel(truth)
    for _ in range(steps):
        features = some_step(rng)
        seconds = exact.seconds(features) * rng.uniform(1 - noise, 1 + noise)
        if rng.random() < outliers:
            seconds *= rng.choice((0.05, 20.0))
        model.observe(features, seconds)


def median_error(model, truth=TRUTH):
    rng = random.Random(99)
    exact = StepTimeModel(truth)
    steps = [some_step(rng) for _ in range(200)]
    return sorted(abs(model.seconds(f) / exact.seconds(f) - 1) for f in steps)[100]


@settings(max_examples=150, deadline=None)
@given(costs, costs, costs, costs, costs, st.floats(0, 0.3), st.integers(0, 50))
def test_the_inverse_is_the_most_tokens_that_fit(base, token, knee1, knee2, request, seconds, requests):
    model = StepTimeModel(Profile(base_s=base, token_s=token, knees_s=(knee1, knee2), request_s=request))
    most = 3000
    found = model.tokens_within(seconds, requests, 0, most)
    fits = [n for n in range(most + 1) if model.seconds(StepFeatures(n, requests, 0)) <= seconds]
    assert abs(found - max(fits, default=0)) <= 1
    assert found == 0 or model.seconds(StepFeatures(found, requests, 0)) <= seconds


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 10.0])
def test_a_prior_that_is_wrong_either_way_is_corrected_within_a_few_steps(factor):
    model = StepTimeModel(scaled(factor))
    teach(model, 10)
    assert median_error(model) < 0.15
    teach(model, 200, seed=1)
    assert median_error(model) < 0.05
    assert model.error() < 0.2


def test_a_shape_that_is_wrong_is_learned():
    model = StepTimeModel(Profile(base_s=0.001, token_s=5e-4))
    teach(model, 400)
    assert median_error(model) < 0.08


def test_what_prompts_cost_is_learned_where_most_steps_are_decodes():
    model = StepTimeModel(TRUTH)
    steep = Profile(base_s=0.02, token_s=10 * TRUTH.token_s)
    rng = random.Random(3)
    for number in range(160):
        tokens = rng.randint(20, 800) if number % 4 == 0 else 1
        features = StepFeatures(tokens, 1, rng.randint(0, 800))
        model.observe(features, StepTimeModel(steep).seconds(features))
    for tokens in (1, 100, 700):
        features = StepFeatures(tokens, 1, 0)
        assert model.seconds(features) == pytest.approx(StepTimeModel(steep).seconds(features), rel=0.05)


def test_outliers_do_not_move_it():
    model = StepTimeModel(scaled(2.0))
    teach(model, 300, outliers=0.1)
    assert median_error(model) < 0.06
    assert 1.0 <= model.margin <= 1.5


def test_one_outlier_at_the_start_does_not_move_it_for_long():
    model = StepTimeModel(TRUTH)
    model.observe(StepFeatures(100, 10, 1000), 30.0)
    teach(model, 6)
    assert median_error(model) < 0.1


def test_an_engine_that_becomes_slower_is_followed():
    model = StepTimeModel(TRUTH)
    teach(model, 300)
    teach(model, 16, seed=2, truth=scaled(3.0))
    assert median_error(model, scaled(3.0)) < 0.2


@pytest.mark.parametrize("seconds", [0.0, -5.0, math.nan, math.inf, 1e6])
def test_what_no_working_clock_says_is_counted_and_ignored(seconds):
    model = StepTimeModel(TRUTH)
    before = model.coefficients
    for _ in range(40):
        model.observe(StepFeatures(100, 10, 1000), seconds)
    assert model.rejected_steps == 40
    assert model.coefficients.coefficients == before.coefficients


def test_predictions_rise_in_every_feature_whatever_was_measured():
    rng = random.Random(5)
    model = StepTimeModel(TRUTH)
    for _ in range(300):
        model.observe(some_step(rng), rng.uniform(0.001, 2.0))
    for _ in range(100):
        features = some_step(rng)
        for place in range(4):
            more = list(features)
            more[place] += rng.randint(1, 500)
            assert model.seconds(StepFeatures(*more)) >= model.seconds(features)


def test_a_learned_profile_predicts_like_the_model_it_came_from():
    model = StepTimeModel(scaled(3.0))
    teach(model, 200)
    copy = StepTimeModel(model.coefficients)
    features = StepFeatures(700, 30, 40_000, 2)
    assert math.isclose(copy.seconds(features), model.seconds(features))


def test_non_negative_least_squares_is_the_best_over_all_supports():
    rng = np.random.default_rng(0)
    for _ in range(60):
        rows, values = rng.normal(size=(12, 4)), rng.normal(size=12)
        weights = rng.uniform(0.1, 1, size=12)

        def loss(x, rows=rows, values=values, weights=weights):
            return float((weights * (rows @ x - values) ** 2).sum())

        best = math.inf
        for free in chain.from_iterable(combinations(range(4), k) for k in range(5)):
            x, columns, root = np.zeros(4), list(free), np.sqrt(weights)
            if columns:
                x[columns] = np.linalg.lstsq(rows[:, columns] * root[:, None], values * root, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, loss(x))
        found = solve(rows, values, weights)
        assert (found >= 0).all()
        assert loss(found) <= best + 1e-6


def test_shipped_profiles_name_their_source_and_an_unknown_one_is_refused():
    assert all(profile.source for profile in shipped_profiles().values())
    with pytest.raises(ValueError, match=r"profile: given 'x', allowed: .*h100"):
        find_profile("x")
