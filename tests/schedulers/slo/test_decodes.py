"""Decodes that are kept from step to step are what the requests are."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
import slo_engine as engine

from penstock.schedulers.slo.decodes import Columns, Decodes, RunningBatch
from penstock.schedulers.slo.requests import Limits, Running
from penstock.schedulers.slo.targets import Targets

PACES = ("mean", "cumulative", "gap")


def decode(number: int, rng: random.Random, now_s: float) -> Running:
    """One whose first token came now, or is on its way."""
    computed, output = rng.randint(10, 900), rng.randint(1, 5)
    first_s = rng.choice((now_s, None))
    return Running(
        request_id=f"r{number}",
        arrival_s=now_s - rng.random(),
        tokens=computed + 1,
        computed_tokens=computed,
        output_tokens=output,
        max_output_tokens=output + rng.randint(1, 40),
        targets=Targets(rng.uniform(0.1, 2.0), rng.choice((0.03, 0.1))),
        first_token_s=first_s,
        last_token_s=first_s,
    )


@pytest.mark.parametrize("pace", PACES)
def test_columns_hold_what_was_counted_one_by_one(pace):
    rng = random.Random(pace)
    kept, model = Decodes(pace), []
    now_s, number = 0.0, 0
    for _ in range(400):
        now_s += 0.02
        deed = rng.random()
        if deed < 0.3:
            for _ in range(rng.choice((1, 2, 30))):
                model.append(decode(number, rng, now_s))
                kept.join([msgspec.structs.replace(model[-1])])
                number += 1
        elif deed < 0.5 and model:
            place = rng.randrange(len(model))
            del model[place]
            kept.leave(place)
        elif deed < 0.6:
            # Some go, and the others stand in another order.
            places = rng.sample(range(len(model)), rng.randint(len(model) // 2, len(model)))
            gone = [(model[at], kept._requests[at]) for at in range(len(model)) if at not in places]
            model = [model[at] for at in places]
            kept.keep(places)
            assert all(its == one for one, its in gone)
        else:
            kept.went_on(1)
            kept.came_back(now_s)
            for one, its in zip(model, kept._requests, strict=True):
                one.tokens, one.computed_tokens = one.tokens + 1, one.computed_tokens + 1
                one.output_tokens, one.last_token_s = one.output_tokens + 1, now_s
                if one.first_token_s is None:
                    one.first_token_s = its.first_token_s = now_s
                    its.last_token_s = now_s
        live = [one for one in model if one.output_tokens < one.max_output_tokens]
        columns = kept.columns()
        assert [columns.request(place) for place in range(len(columns))] == live
        np.testing.assert_array_equal(columns.values, Columns.of(live, pace).values)
    assert number > 200


@pytest.mark.parametrize("pace", PACES)
def test_a_plan_is_the_same_whether_decodes_are_known_or_looked_at(pace):
    """Some known, some not; tight limits, so that order matters, and a free choice of whom to serve."""
    passed_over = 0
    for seed in range(60):
        rng = random.Random(f"{pace} {seed}")
        running = [decode(number, rng, rng.uniform(0.0, 1.0)) for number in range(rng.choice((3, 40)))]
        for one in running:
            one.first_token_s = one.last_token_s = one.arrival_s + rng.random()
        prompts = engine.trace(seed, 8, 1)
        limits = Limits(step_tokens=rng.choice((8, 512)), running_requests=64)
        known = rng.randrange(len(running) + 1)
        others = [msgspec.structs.replace(one) for one in running[known:]]
        batches = (running, RunningBatch(Columns.of(running[:known], pace), others))
        plans = []
        for batch in batches:
            policy = engine.planner(engine.SLOConfig(pace=pace, resumed_token_s=0.0))
            helper = engine.Engine([])
            for prompt in prompts:
                policy.arrive(helper._as_waiting(prompt))
            plans.append([policy.plan(1.0 + 0.05 * step, batch, 5_000, limits) for step in range(4)])
        assert plans[0] == plans[1]
        passed_over += sum(len(plan.caps) < len(running) for plan in plans[0])
    assert passed_over > 20
