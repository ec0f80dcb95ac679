"""The cost of a draft token is found where a fit of all steps cannot see it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from penstock.schedulers.draft_cost import DraftCost
from penstock.schedulers.slo.profiles import Profile
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel

PRIOR = Profile(base_s=0.03, token_s=4e-5)


def observed(token_s, drafts, *, base_s=0.02, noise=0.0, seed=0):
    rng = random.Random(seed)
    model = StepTimeModel(PRIOR)
    cost = DraftCost(model)
    for step, drafted in enumerate(drafts):
        features = StepFeatures(16 + drafted, 16, 1000 + 16 * step)
        seconds = (base_s + token_s * features.tokens) * (1 + noise * rng.gauss(0, 1))
        model.observe(features, seconds)
        cost.observe(features, drafted, seconds)
    return cost


@pytest.mark.parametrize("token_s", [0.0, 1e-4, 3e-3])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_steps_that_differ_show_what_a_token_costs(token_s, noise):
    cost = observed(token_s, [0, 64] * 60, noise=noise)
    found = cost.seconds(StepFeatures(0, 16, 3000), 16 + np.arange(65))
    truth = 0.02 + token_s * (16 + np.arange(65))
    np.testing.assert_allclose(found, truth, rtol=0.05 + 2 * noise)
    assert (np.diff(found) > -1e-12).all()
    assert not cost.unsure(64)


@pytest.mark.parametrize("pass_s", [0.0, 2e-3])
def test_tokens_and_passes_are_told_apart(pass_s):
    rng = random.Random(1)
    cost = DraftCost(StepTimeModel(PRIOR))
    for _ in range(100):
        drafted, passes = rng.choice((0, 32, 64)), rng.choice((1, 3, 5))
        seconds = 0.02 + 1e-4 * (16 + drafted) + pass_s * passes
        cost.observe(StepFeatures(16 + drafted, 16, 0, passes), drafted, seconds)
    assert cost.token_s == pytest.approx(1e-4, rel=0.02)
    assert cost.pass_s == pytest.approx(pass_s, abs=2e-5)
    (found,) = cost.seconds(StepFeatures(0, 16, 0, 3), np.array([16]))
    assert found == pytest.approx(0.0216 + 3 * pass_s, rel=0.02)
    assert not cost.unsure_of_passes(4)


def test_steps_that_are_all_alike_leave_it_unsure():
    assert observed(1e-3, [64] * 60).unsure(64)
    assert not observed(1e-3, [64] * 60).unsure(0)


def test_steps_with_prompts_or_another_batch_are_not_compared():
    cost = DraftCost(StepTimeModel(PRIOR))
    for requests, prompts, drafted in ((8, 0, 0), (9, 0, 40), (9, 500, 0), (9, 0, 40), (8, 0, 0)):
        cost.observe(StepFeatures(requests + prompts + drafted, requests, 0), drafted, 0.02)
    assert cost.unsure(1)


def test_a_step_that_hung_is_not_taken_for_the_price_of_its_drafts():
    cost = DraftCost(StepTimeModel(PRIOR))
    for step in range(100):
        drafted = 32 * (step % 2)
        hung = 30.0 if step == 51 else 0.0
        cost.observe(StepFeatures(16 + drafted, 16, 0), drafted, 0.02 + 1e-5 * drafted + hung)
    assert cost.token_s < 1e-4


def test_where_the_model_is_steeper_its_slope_counts():
    steep = Profile(base_s=0.03, token_s=4e-5, knees_s=(1e-3, 0.0))
    cost = DraftCost(StepTimeModel(steep))
    found = cost.seconds(StepFeatures(0, 256, 0), 256 + np.arange(1025))
    assert np.diff(found)[-1] > 10 * np.diff(found)[0]
