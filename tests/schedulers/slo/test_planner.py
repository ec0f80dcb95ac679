"""What the plan promises, on a virtual engine that serves whole traces."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest
from slo_engine import TRUTH, Engine, Request, attainment, planner, trace

from penstock.schedulers.draft_config import SpeculationConfig
from penstock.schedulers.drafts import Drafts
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.plan import PASSIVE
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.profiles import Profile
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.schedulers.slo.targets import Targets

LIMITS = Limits(step_tokens=2048, running_requests=64)


def scaled(factor):
    return Profile(
        base_s=TRUTH.base_s * factor, token_s=TRUTH.token_s * factor, context_s=TRUTH.context_s * factor
    )


def serve(requests, policy, **options):
    engine = Engine(requests, policy, **options)
    served = engine.run()
    assert all(len(r.times) == r.output for r in served), "every request gets all its tokens"
    if policy:
        policy.check_integrity()
        assert not len(policy.backlog)
        assert not policy._demoted
        assert not policy._thrown_out
        assert not policy.replanner.admitted
    return engine, served


def decoding(name, targets, output, arrival_s=0.0, **more):
    return Running(
        request_id=name,
        arrival_s=arrival_s,
        tokens=100 + output,
        computed_tokens=99 + output,
        output_tokens=output,
        targets=targets,
        first_token_s=arrival_s + 0.1,
        **more,
    )


def test_without_any_target_the_plan_leaves_everything_to_the_engine():
    policy = planner()
    policy.arrive(Waiting("a", "", 100, 0.0))
    policy.arrive(Waiting("b", "", 10, 0.0))
    plan = policy.plan(1.0, [decoding("c", None, 5)], 10_000, LIMITS)
    assert plan is PASSIVE
    assert plan.cap("a", 77) == 77
    assert [policy.backlog.pop().request_id for _ in range(2)] == ["a", "b"]


def test_without_any_target_requests_are_served_as_by_the_engine_alone():
    _with_policy, served = serve(trace(3, 4, 15, without=1.0), planner(), kv=20_000)
    _without, stock = serve(trace(3, 4, 15, without=1.0), None, kv=20_000)
    assert [r.times for r in served] == [r.times for r in stock]


def test_at_overload_more_requests_attain_their_targets_than_first_come_first_served():
    gained = []
    for seed in (1, 2):
        _, served = serve(trace(seed, 4.5, 25), planner())
        best = max(attainment(serve(trace(seed, 4.5, 25), None, budget=b)[1]) for b in (1024, 8192))
        gained.append(attainment(served) / best)
    assert min(gained) > 1.15


@cache
def with_the_right_prior():
    return attainment(serve(trace(1, 3.25, 25), planner())[1])


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 10.0])
def test_a_wrong_prior_costs_little_and_starves_nobody(factor):
    _, wrong = serve(trace(1, 3.25, 25), planner(prior=scaled(factor)))
    assert attainment(wrong) >= 0.9 * with_the_right_prior()


@pytest.mark.parametrize("rule", ["moore_hodgson", "edf_greedy", "dynamic_program"])
def test_every_rule_serves_everything_and_keeps_the_bound_on_suspension(rule):
    config = SLOConfig(rule=rule, most_skipped_steps=6, patience_s=3.0)
    engine, _ = serve(trace(4, 5.0, 12, without=0.3), planner(config), kv=60_000)
    assert engine.longest_held_back <= 6


def test_a_request_is_not_passed_over_for_longer_than_the_bound_in_seconds():
    config = SLOConfig(most_skipped_steps=1000, most_skipped_s=0.4)
    policy = planner(config)
    serve(trace(5, 5.0, 12, without=0.3), policy)
    assert policy.suspensions.longest_s <= 0.4 + 2 * config.longest_step_s


def test_best_effort_requests_are_served_under_a_load_that_never_ends():
    config = SLOConfig(patience_s=2.0)
    requests = trace(6, 8.0, 25)
    poor = Request("poor", 1.0, 3000, 20, None)
    serve([*requests, poor], planner(config))
    assert poor.times[0] < 20.0


def test_memory_pressure_preempts_best_effort_first_and_a_bounded_number_of_times():
    config = SLOConfig(most_preemptions=2, patience_s=5.0)
    policy = planner(config)
    _, served = serve(trace(7, 4.0, 15, without=0.5), policy, kv=16_000, seats=24)
    assert policy.counters.preempted > 0
    asked = [r for r in served if r.targets]
    others = [r for r in served if not r.targets]
    assert sum(r.preempted for r in others) > sum(r.preempted for r in asked)


@pytest.mark.parametrize("jump_s", [-3.0, -1000.0, 0.7])
def test_a_clock_that_jumps_loses_no_request_and_stops_nothing(jump_s):
    engine, _ = serve(trace(8, 3.0, 12), planner(), jumps=[(50, jump_s), (120, jump_s / 2)])
    assert engine.idle < 200


def test_an_engine_ten_times_slower_than_its_prior_still_serves_everything():
    slow = scaled(10)
    serve(trace(9, 0.3, 30, truth=slow), planner(prior=TRUTH), truth=slow)


def test_the_step_ends_before_the_tightest_decode_is_due():
    policy = planner()
    policy.arrive(Waiting("p", "", 5000, 0.0, targets=Targets(20.0, 0.1)))
    tight = decoding("tight", Targets(0.5, 0.05), 4)
    plan = policy.plan(0.62, [tight], 100_000, Limits(step_tokens=8192, running_requests=64))
    assert plan.caps["tight"] == 1
    assert plan.waiting == ("p",)
    assert plan.predicted_s <= 0.7 - 0.62 + 1e-9
    more = StepFeatures(plan.features.tokens + 30, *plan.features[1:])
    assert policy.model.seconds(more) > 0.7 - 0.62


def test_a_decode_with_banked_slack_gives_its_place_to_a_prompt_and_not_to_nothing():
    banked = decoding("banked", Targets(5.0, 0.1), 4)
    policy = planner()
    assert policy.plan(0.5, [banked], 100_000, LIMITS).caps == {"banked": 1}
    policy.arrive(Waiting("p", "", 50_000, 0.0, targets=Targets(20.0, 0.1)))
    plan = policy.plan(0.51, [banked], 100_000, LIMITS)
    assert set(plan.caps) == {"p"}


def test_a_model_that_believes_steps_are_endless_leaves_prompts_their_floor():
    policy = planner(prior=Profile(base_s=50.0, token_s=1.0))
    prompt = Running(request_id="p", arrival_s=0.0, tokens=5000, computed_tokens=0, targets=Targets(9.0, 0.1))
    plan = policy.plan(0.0, [decoding("d", Targets(1.0, 0.05), 2), prompt], 100_000, LIMITS)
    assert plan.caps["p"] == policy.config.least_prefill_tokens


def test_prompts_are_served_by_deadline_and_those_out_of_reach_last():
    policy = planner()
    for _ in range(20):
        features = StepFeatures(100, 1, 100)
        policy.observe_step(features, StepTimeModel(TRUTH).seconds(features))
    asks = {"late": 0.001, "second": 2.0, "first": 1.0}
    for name, ttft_s in asks.items():
        policy.arrive(Waiting(name, "", 200, 0.0, targets=Targets(ttft_s, 0.1)))
    assert policy.plan(0.5, [], 100_000, LIMITS).waiting == ("first", "second", "late")


def test_who_was_admitted_is_not_dropped_for_who_comes_later():
    policy = planner(SLOConfig(long_prompt_weight=0.0))
    policy.arrive(Waiting("big", "", 20_000, 0.0, targets=Targets(1.9, 0.1)))
    policy.plan(0.0, [], 400_000, LIMITS)
    assert list(policy.replanner.admitted) == ["big"]
    for i in range(12):
        policy.arrive(Waiting(f"small{i}", "", 900, 0.0, targets=Targets(1.8, 0.1)))
    policy.plan(0.01, [], 400_000, LIMITS)
    assert "big" in policy.replanner.admitted


def test_a_request_that_needs_its_room_throws_out_the_last_best_effort_one_only_if_that_helps():
    running = [decoding(f"be{i}", None, 100, arrival_s=float(i)) for i in range(3)]
    policy = planner()
    policy.arrive(Waiting("p", "", 300, 3.0, targets=Targets(2.0, 0.1)))
    assert policy.plan(3.0, running, 150, LIMITS).preempt == ("be2",)
    policy = planner()
    policy.arrive(Waiting("p", "", 5000, 3.0, targets=Targets(2.0, 0.1)))
    assert policy.plan(3.0, running, 150, LIMITS).preempt == ()


def test_drafts_are_chosen_beside_the_caps_within_the_engine_s_limit():
    model = StepTimeModel(TRUTH)
    policy = Planner(SLOConfig(), model, Drafts(SpeculationConfig(probe_share=0.0), 5, model))
    running = [decoding(f"d{i}", Targets(1.0, 0.05), 2) for i in range(4)]
    for request in running:
        request.draft_tokens = 5
    plan = policy.plan(1.0, running, 100_000, Limits(step_tokens=16, running_requests=64))
    assert plan.drafts
    assert set(plan.caps.values()) == {1}
    assert plan.step_tokens == len(plan.caps)
    assert plan.features.tokens == plan.step_tokens + sum(plan.drafts.values()) <= 16


def test_drafts_that_nobody_chooses_count_in_the_step():
    policy = planner()
    running = [decoding(f"d{i}", Targets(1.0, 0.05), 2) for i in range(4)]
    for request in running:
        request.draft_tokens = 5
    plan = policy.plan(1.0, running, 100_000, LIMITS)
    assert not plan.drafts
    assert plan.features.tokens == plan.step_tokens + 20


def test_no_draft_reaches_beyond_the_last_token():
    model = StepTimeModel(TRUTH)
    policy = Planner(SLOConfig(), model, Drafts(SpeculationConfig(probe_share=0.0), 5, model))
    running = [decoding(f"d{i}", Targets(1.0, 0.05), 2) for i in range(4)]
    for left, request in enumerate(running, start=1):
        request.draft_tokens, request.max_output_tokens = 5, request.output_tokens + left
    plan = policy.plan(1.0, running, 100_000, LIMITS)
    assert all(plan.drafts.get(f"d{left - 1}", 0) <= left - 1 for left in range(1, 5))


@pytest.mark.parametrize(
    ("resumed_token_s", "served"),
    [(0.0, {"tight"}), (9e-8, {"tight"}), (11e-8, {"tight", "slack", "more slack"})],
)
def test_decodes_give_their_place_to_prompts_only_where_that_saves_more_than_it_costs(
    resumed_token_s, served
):
    """Each makes a step longer by 0.1 ms: a token, and 1,000 to attend to."""
    profile = Profile(base_s=0.01, token_s=5e-5, context_s=5e-8)
    config = SLOConfig(resumed_token_s=resumed_token_s, pace="cumulative")
    policy = Planner(config, StepTimeModel(profile))
    policy.arrive(Waiting("prompt", "", 10_000, 46.0, targets=Targets(2.0, 0.1)))
    running = [
        decoding(name, Targets(ttft_s, 0.05), 900)
        for name, ttft_s in (("tight", 1.1), ("slack", 5.0), ("more slack", 9.0))
    ]
    plan = policy.plan(46.0, running, 100_000, LIMITS)
    assert plan.caps.keys() - {"prompt"} == served
    assert plan.caps["prompt"] > 0


def test_where_all_are_served_and_have_room_they_stay_in_their_order():
    policy = Planner(SLOConfig(), StepTimeModel(Profile(base_s=0.001, token_s=1e-6)))
    names = ("b", "c", "a")
    running = [
        decoding(name, Targets(5.0, tpot_s), 5) for name, tpot_s in zip(names, (0.3, 0.1, 0.2), strict=True)
    ]
    limits = Limits(step_tokens=2048, running_requests=64, block_tokens=16)
    roomy = policy.plan(0.2, running, 1_000, limits)
    assert (roomy.order, roomy.reorders) == (names, False)
    tight = policy.plan(0.2, running, 50, limits)
    assert (tight.order, tight.reorders) == (("c", "a", "b"), True)


def test_requests_leave_in_every_state():
    policy = planner()
    rng = random.Random(0)
    alive = {}
    for number in range(400):
        name = f"r{number}"
        ttft_s = rng.choice((0.001, 1.0, 5.0))
        policy.arrive(Waiting(name, "", 100, number * 0.01, targets=Targets(ttft_s, 0.05)))
        alive[name] = None
        policy.plan(number * 0.01, [], rng.choice((0, 5000)), LIMITS)
        while len(alive) > 20:
            gone = rng.choice(list(alive))
            del alive[gone]
            policy.leave(gone)
        policy.check_integrity()
        assert len(policy.backlog) == len(alive)
    assert math.isfinite(policy.model.seconds(StepFeatures(1, 1, 1)))


def test_a_batch_that_decodes_on_is_planned_without_a_look_at_its_slack_as_with_one():
    stood = 0
    for seed in range(200):
        rng = random.Random(seed)
        running = [
            decoding(
                f"r{i}",
                Targets(rng.choice((0.5, 5.0, math.inf)), rng.choice((0.02, 0.1))),
                rng.randint(1, 50),
                rng.uniform(-20, 0),
                last_token_s=rng.uniform(-1, 0),
            )
            for i in range(rng.randint(1, 20))
        ]
        limits = Limits(
            step_tokens=rng.choice((10, 2048)),
            running_requests=rng.choice((len(running), 64)),
            block_tokens=16,
        )
        policy, other = (planner(SLOConfig(pace=rng.choice(("mean", "gap")))) for _ in range(2))
        for i in range(rng.randint(0, 20)):
            for one in (policy, other):
                due_s = rng.choice((0.001, 1.0, 30.0))
                one.arrive(Waiting(f"w{i}", "", rng.randint(1, 3000), -0.5, targets=Targets(due_s, 0.1)))
        free = rng.choice((16 * len(running) - 1, 16 * len(running), 100_000))
        names = tuple(one.request_id for one in running)
        whole = policy.whole(0.0, names, free, limits)
        if whole is not None:
            stood += 1
            by_slack = other.plan(0.0, running, free, limits)
            assert whole.caps == by_slack.caps
            assert whole.step_tokens == by_slack.step_tokens
            assert sorted(whole.order) == sorted(by_slack.order)
            assert (by_slack.waiting, by_slack.preempt, by_slack.drafts) == ((), (), {})
            assert policy.whole(0.1, names, free, limits) is whole
            policy.check_integrity()
    assert 30 < stood < 170


def test_while_nobody_can_come_in_deadlines_that_pass_are_noticed_and_nobody_is_weighed():
    policy = planner()
    limits = Limits(step_tokens=2048, running_requests=1)
    for i in range(30):
        policy.arrive(Waiting(f"w{i}", "", 100, 0.0, targets=Targets(1.0 if i < 20 else 60.0, 0.1)))
    for step in range(30):
        assert policy.whole(0.1 * step, ("r",), 10_000, limits)
    assert policy.replan_counters.replans == 0
    assert policy.replan_counters.demoted == 20
    policy.plan(3.0, [], 10_000, limits)
    assert policy.replan_counters.replans == 1


def with_lent_time(prompt_ttft_s, prompt_targets=True):
    """A step beside a fresh answer that has 0.05 s, at a prompt of 3,000 tokens."""
    config = SLOConfig(pace="mean", rule="sustained", lending="losses", resumed_token_s=1.0)
    policy = Planner(config, StepTimeModel(TRUTH))
    for _ in range(200):
        policy.observe_step(StepFeatures(1, 1, 100), policy.model.seconds(StepFeatures(1, 1, 100)))
    targets = Targets(prompt_ttft_s, 0.1) if prompt_targets else None
    policy.arrive(Waiting("long", "", 3000, 1.0, targets=targets))
    fresh = decoding("fresh", Targets(0.5, 0.05), 1, 0.9, last_token_s=1.0)
    return policy.plan(1.0, [fresh], 100_000, LIMITS)


def test_a_prompt_that_would_be_late_at_the_pace_is_lent_time_and_no_other_is():
    hurried, unhurried = with_lent_time(0.35), with_lent_time(60.0)
    assert 0.05 < hurried.predicted_s <= 0.2
    assert 0.04 < unhurried.predicted_s <= 0.05
    without_targets = with_lent_time(60.0, prompt_targets=False)
    assert without_targets.predicted_s <= 0.05
    assert without_targets.caps["long"] > 0
