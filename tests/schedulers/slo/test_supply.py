"""Prompt tokens that decodes leave room for, with and without drafts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from penstock.schedulers.slo.profiles import Profile
from penstock.schedulers.slo.step_time import StepTimeModel
from penstock.schedulers.slo.supply import Counts, ModelledSupply, Yield
from penstock.schedulers.slo.targets import Tiers


def supply(yields: Yield, token_s: float = 1e-4) -> ModelledSupply:
    model = StepTimeModel(Profile(base_s=0.025, token_s=token_s))
    return ModelledSupply(
        model,
        Tiers((0.05, 0.1)),
        (0.0, 0.0),
        context_tokens=0.0,
        longest_step_s=0.2,
        most_tokens=8192,
        yields=yields,
    )


@pytest.mark.parametrize(("counts", "step_s", "decodes"), [((10, 0), 0.15, 10), ((10, 6), 0.15, 13)])
def test_a_step_lasts_as_long_as_what_decodes_get_of_it_pays_for(counts: Counts, step_s: float, decodes: int):
    tokens = round((step_s - 0.025) / 1e-4)
    assert supply(Yield(3.0, 6.0)).rate(counts) == pytest.approx((tokens - 6 * decodes) / step_s)


def test_drafts_that_are_never_right_leave_prompts_less_room():
    assert supply(Yield(1.0, 6.0)).rate((20, 0)) < supply(Yield()).rate((20, 0))
    assert not supply(Yield(1.0, 6.0)).sustains((100, 0))
    assert supply(Yield()).sustains((100, 0))


def test_many_combinations_at_once_leave_what_each_one_leaves():
    rng = random.Random(0)
    for _ in range(40):
        profile = Profile(
            base_s=rng.choice((0, 0.01, 0.025)),
            token_s=rng.choice((1e-5, 7e-5)),
            knees_s=(rng.choice((0, 1e-5)), rng.choice((0, 2e-5))),
            request_s=rng.choice((0, 1e-5)),
            context_s=rng.choice((0, 8e-8)),
        )
        modelled = ModelledSupply(
            StepTimeModel(profile),
            Tiers((0.025, 0.05, 0.1, 0.25)),
            [rng.choice((0, 0, rng.random() * 60)) for _ in range(4)],
            context_tokens=rng.random() * 3000,
            longest_step_s=0.2,
            most_tokens=rng.choice((512, 2048, 8192)),
            yields=rng.choice((Yield(), Yield(1.7, 3.0))),
        )
        counts = [tuple(rng.choice((0, rng.randrange(80))) for _ in range(4)) for _ in range(30)]
        rates, sustained = modelled.of_each(np.array(counts))
        assert rates.tolist() == [modelled.rate(one) for one in counts]
        assert sustained.tolist() == [modelled.sustains(one) for one in counts]
