"""A plan that was laid out before its step is the one that is made when the step begins."""

from __future__ import annotations

import random

import pytest
from slo_engine import planner

from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.decodes import Columns, RunningBatch
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.targets import Targets


def batch(rng, pace):
    """Some who decode under targets, and others: best-effort ones, and prompts under way."""
    decodes, others = [], []
    for i in range(rng.randint(1, 30)):
        targets = Targets(rng.choice((0.5, 5.0)), rng.choice((0.03, 0.1, 0.25)))
        output = rng.randint(1, 50)
        decodes.append(
            Running(
                request_id=f"d{i}",
                arrival_s=rng.uniform(-6, -1),
                tokens=300 + output,
                computed_tokens=299 + output,
                output_tokens=output,
                targets=targets,
                first_token_s=-0.05 * output,
                last_token_s=-0.01,
            )
        )
    for i in range(rng.randint(0, 4)):
        targets = rng.choice((None, Targets(2.0, 0.1)))
        done = rng.choice((0, 200, 499))
        output = int(done == 499)
        others.append(
            Running(
                request_id=f"o{i}",
                arrival_s=rng.uniform(-1, 0),
                tokens=500,
                computed_tokens=done,
                output_tokens=output,
                targets=targets,
            )
        )
    return RunningBatch(Columns.of(decodes, pace), others)


def situation(seed):
    """A planner with some who wait, a batch, and what the engine has."""
    rng = random.Random(seed)
    pace = rng.choice(("mean", "cumulative", "gap"))
    policy = planner(SLOConfig(pace=pace, patience_s=rng.choice((0.5, 10.0))))
    for i in range(rng.randint(0, 60)):
        targets = rng.choice((None, Targets(rng.choice((0.3, 3.0)), 0.1)))
        policy.arrive(Waiting(f"w{i}", "", rng.randint(20, 2000), rng.uniform(-1, 0), targets=targets))
    limits = Limits(step_tokens=2048, running_requests=rng.choice((20, 40)), block_tokens=16)
    return policy, batch(rng, pace), rng.choice((500, 50_000)), limits, rng


def without(running, names):
    """The batch but for some."""
    decodes = running.decodes
    kept = [decodes.request(place) for place, name in enumerate(decodes.names) if name not in names]
    others = [request for request in running.others if request.request_id not in names]
    return kept, others


@pytest.mark.parametrize("seed", range(60))
def test_with_nothing_in_between_it_is_the_plan(seed):
    (policy, running, free, limits, _), (other, same, *_) = situation(seed), situation(seed)
    expected = other.plan(0.0, same, free, limits)
    layout = policy.lay_out(0.0, running, free, limits)
    assert layout is not None
    assert policy.complete(layout, 0.0, (), free, limits) == expected
    assert policy.counters == other.counters


@pytest.mark.parametrize("seed", range(60))
def test_those_who_ended_leave_no_trace_and_their_seats_are_taken(seed):
    policy, running, free, limits, rng = situation(seed)
    names = [request.request_id for request in running]
    ended = set(rng.sample(names, min(len(names) - 1, rng.randint(1, 5)))) | {"unknown"}
    layout = policy.lay_out(0.0, running, free, limits)
    kept, others = without(running, ended)
    plan = policy.complete(layout, 0.002, ended, free, limits)
    assert not ended & plan.caps.keys()
    assert not ended & set(plan.order)
    assert set(plan.order) | set(plan.preempt) == {one.request_id for one in (*kept, *others)}
    assert sum(plan.caps.values()) == plan.features.tokens
    run_on = {one.request_id: one.computed_tokens for one in (*kept, *others)}
    assert plan.features.context_tokens == sum(run_on.get(name, 0) for name in plan.caps)
    assert not plan.waiting or len(plan.order) + len(plan.waiting) <= limits.running_requests
    fresh, _, _, _, _ = situation(seed)
    by_then = fresh.plan(0.002, RunningBatch(Columns.of(kept, fresh.config.pace), others), free, limits)
    # Whoever decodes has its token in both; where nothing is decided anew the same come in.
    if not plan.preempt and not by_then.preempt and not (plan.reorders or by_then.reorders):
        assert {n for n in plan.caps if n in run_on} == {n for n in by_then.caps if n in run_on}


def test_a_step_that_begins_later_has_so_much_less_time_for_prompts():
    given = []
    for late_s in (0.0, 0.01):
        policy = planner(SLOConfig(pace="cumulative"))
        decode = Running(
            request_id="d",
            arrival_s=-1.0,
            tokens=100,
            computed_tokens=99,
            output_tokens=1,
            targets=Targets(1.0, 0.08),
            first_token_s=-0.1,
        )
        targets = Targets(9.0, 0.1)
        prompt = Running(request_id="p", arrival_s=0.0, tokens=4000, computed_tokens=0, targets=targets)
        limits = Limits(step_tokens=8192, running_requests=8)
        columns = Columns.of([decode], "cumulative")
        layout = policy.lay_out(0.0, RunningBatch(columns, [prompt]), 10_000, limits)
        plan = policy.complete(layout, late_s, (), 10_000, limits)
        given.append(plan.caps["p"])
        at_once = planner(SLOConfig(pace="cumulative"))
        assert plan.caps == at_once.plan(late_s, RunningBatch(columns, [prompt]), 10_000, limits).caps
    assert given[0] > given[1] > 128


@pytest.mark.parametrize("now_s", [-1.0, 5.0])
def test_a_layout_for_another_time_is_none(now_s):
    policy, running, free, limits, _ = situation(1)
    layout = policy.lay_out(0.0, running, free, limits)
    plans = policy.counters.plans
    assert policy.complete(layout, now_s, (), free, limits) is None
    assert policy.counters.plans == plans
