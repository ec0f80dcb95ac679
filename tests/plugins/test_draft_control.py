"""Draft lengths in vLLM's scheduler: answers never change, counts agree, and drafts go where they pay."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from drafting_engine import DRAFT_TOKENS, Clock, DraftingSettings, DraftingStepper, DraftModelSettings
from stepped_scheduler import Settings, build, request, token
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from penstock.patches.vllm.stat_logging import PAYLOAD_KEY
from penstock.plugins import features
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.vllm.draft_budget import DraftBudget
from penstock.plugins.vllm.draft_control import makes_passes
from penstock.plugins.vllm.request_scheduler import (
    make_scheduler,
)
from penstock.schedulers.draft_config import SpeculationConfig
from penstock.schedulers.drafts import Drafts
from penstock.schedulers.slo.profiles import find_profile
from penstock.schedulers.slo.step_time import StepTimeModel

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def engine(
    rate_of,
    *,
    is_async=False,
    clock=None,
    blocks=2000,
    make=make_scheduler,
    kind=DraftingSettings,
    **ours: Any,
):
    clock = clock or Clock()
    settings = kind(blocks=blocks, budget=256, seqs=16, is_async=is_async, ours=ours)
    arguments = {"clock": clock} if make is make_scheduler else {}
    scheduler = build(settings, make, **arguments)
    return DraftingStepper(scheduler, rate_of, clock, depth=2 if is_async else 1)


def send(stepper, count, output=60, prompt=20, **extra: Any):
    sent = [request(f"r{i}", [i] * prompt, output, **extra) for i in range(count)]
    for one in sent:
        stepper.scheduler.add_request(one)
    return sent


def answers(sent):
    return [list(one.output_token_ids) for one in sent]


def expected(sent):
    """What a model says that nobody drafts for."""
    return [
        [token(one.request_id, one.num_prompt_tokens + place) for place in range(one.max_tokens)]
        for one in sent
    ]


@BOTH
@pytest.mark.parametrize("policy", ["dlpm", "vtc", "lpm", "fcfs", "slo"])
@pytest.mark.parametrize("rate", [0.0, 0.7, 1.0])
def test_answers_are_those_without_speculation(policy, is_async, rate):
    stepper = engine(lambda _: rate, is_async=is_async, policy=policy, speculation={})
    rng = random.Random(policy)
    sent = []
    for number in range(30):
        sent.append(
            request(
                f"r{number}",
                [number] * rng.randrange(1, 300),
                rng.randrange(1, 50),
                client_id="ab"[number % 2],
            )
        )
        stepper.scheduler.add_request(sent[-1])
        stepper.step()
    stepper.drain()
    assert answers(sent) == expected(sent)
    stepper.scheduler.drafts.check_integrity()
    assert not stepper.scheduler.drafts._known


@BOTH
def test_with_targets_the_plan_chooses_lengths_and_answers_are_the_same(is_async):
    stepper = engine(
        lambda name: 0.9 if name < "r5" else 0.2, is_async=is_async, policy="slo", speculation={}
    )
    rng = random.Random(3)
    sent = []
    for number in range(20):
        targets = (
            {"ttft_slo_ms": 2000.0, "tpot_slo_ms": rng.choice((15.0, 40.0, 200.0))} if number % 4 else {}
        )
        sent.append(request(f"r{number}", [number] * rng.randrange(1, 300), rng.randrange(2, 50), **targets))
        stepper.scheduler.add_request(sent[-1])
        stepper.step()
    stepper.drain()
    assert answers(sent) == expected(sent)
    scheduler = stepper.scheduler
    scheduler.check_integrity()
    scheduler.drafts.check_integrity()
    counts = scheduler.drafts.counts()
    assert counts["allocated"] == stepper.heard.drafted > 0
    assert scheduler.planner.counters.plans > scheduler.planner.counters.passive
    assert not len(scheduler.drafts.drafts.lengths.table)


def test_under_the_plan_a_request_without_slack_gets_the_longer_drafts():
    clock = Clock(base_s=0.035, token_s=1.5e-3)
    stepper = engine(lambda _: 0.6, clock=clock, policy="slo", speculation={})
    for number in range(12):
        tpot_ms = 55.0 if number < 4 else 2000.0
        targets = {"ttft_slo_ms": 60_000.0, "tpot_slo_ms": tpot_ms, "client_id": "c"}
        stepper.scheduler.add_request(request(f"r{number}", [number] * 20, 150, **targets))
    for _ in range(40):
        stepper.step()
    pressed = sum(sum(stepper.heard.by_request.get(f"r{i}", [])) for i in range(4)) / 4
    others = sum(sum(stepper.heard.by_request.get(f"r{i}", [])) for i in range(4, 12)) / 8
    assert pressed > 1.5 * others


def test_answers_survive_preemption():
    stepper = engine(lambda _: 0.8, blocks=40, policy="fcfs", speculation={"least_gain": 0.0})
    sent = send(stepper, 12, output=60)
    stepper.drain()
    assert answers(sent) == expected(sent)
    assert sum(one.num_preemptions for one in sent) > 3
    stepper.scheduler.drafts.check_integrity()


@BOTH
def test_what_was_drafted_and_accepted_is_counted(is_async):
    stepper = engine(
        lambda name: 0.9 if name < "r4" else 0.4, is_async=is_async, policy="fcfs", speculation={}
    )
    send(stepper, 8)
    stepper.drain()
    counts = stepper.scheduler.drafts.counts()
    assert counts["allocated"] == stepper.heard.drafted > 0
    assert counts["wasted"] == stepper.heard.drafted - counts["accepted"]
    # vLLM takes no acceptance of a request that had ended while its draft was verified.
    assert 0 <= stepper.heard.accepted - counts["accepted"] <= 8 * DRAFT_TOKENS


@BOTH
def test_cheap_tokens_are_drafted_in_full_and_dear_ones_hardly_at_all(is_async):
    drafted, steps = [], []
    for token_s in (1e-6, 5e-2):
        clock = Clock(token_s=token_s)
        stepper = engine(lambda _: 0.9, is_async=is_async, clock=clock, policy="fcfs", speculation={})
        sent = send(stepper, 8, output=300)
        for _ in range(40):
            stepper.step()
        before = stepper.heard.drafted, sum(one.num_output_tokens for one in sent)
        stepper.drain()
        made = sum(one.num_output_tokens for one in sent) - before[1]
        drafted.append((stepper.heard.drafted - before[0]) / made)
        steps.append(len(stepper.steps))
    assert drafted[0] > 0.8
    assert drafted[1] < 0.05
    assert steps[0] < 0.4 * steps[1]


@BOTH
@pytest.mark.parametrize("policy", ["fcfs", "slo"])
def test_a_draft_model_makes_the_passes_that_pay_and_answers_are_the_same(policy, is_async):
    targets = {"ttft_slo_ms": 60_000.0, "tpot_slo_ms": 100.0} if policy == "slo" else {}
    passes = []
    for pass_s in (1e-6, 2e-2):
        clock = Clock(pass_s=pass_s)
        stepper = engine(
            lambda _: 0.8,
            is_async=is_async,
            clock=clock,
            kind=DraftModelSettings,
            policy=policy,
            speculation={},
        )
        sent = send(stepper, 8, output=200, **targets)
        stepper.drain()
        assert answers(sent) == expected(sent)
        stepper.scheduler.drafts.check_integrity()
        passes.append(np.mean(stepper.depths[20:]))
    assert passes[0] > 3.5
    assert passes[1] < 1.5


@BOTH
def test_nobody_verifies_more_than_was_drafted_in_the_step_before(is_async):
    stepper = engine(
        lambda _: 0.7,
        is_async=is_async,
        clock=Clock(token_s=3e-4, pass_s=3e-3),
        kind=DraftModelSettings,
        policy="fcfs",
        speculation={"least_gain": 0.0},
    )
    longest = []
    schedule = stepper.scheduler.schedule

    def watched():
        output = schedule()
        lengths = map(len, output.scheduled_spec_decode_tokens.values())
        longest.append((max(lengths, default=0), output.num_spec_tokens_to_schedule))
        return output

    stepper.scheduler.schedule = watched
    for count in range(6):
        stepper.scheduler.add_request(request(f"r{count}", [count] * 20, 60))
        for _ in range(8):
            stepper.step()
    stepper.drain()
    assert all(length <= before for (_, before), (length, _) in pairwise(longest))
    assert len({depth for _, depth in longest}) > 1


def test_passes_are_ordered_where_the_drafter_makes_as_many_as_it_is_told():
    def config(method, *, v2=False, ranks=1, parallel=False):
        return SimpleNamespace(
            speculative_config=SimpleNamespace(
                method=method, parallel_drafting=parallel, use_multi_module_mtp=lambda: False
            ),
            parallel_config=SimpleNamespace(data_parallel_size=ranks),
            use_v2_model_runner=v2,
        )

    assert all(makes_passes(config(method)) for method in ("eagle", "eagle3", "mtp", "draft_model"))
    assert not any(makes_passes(config(method)) for method in ("ngram", "suffix", "medusa", "custom_class"))
    assert makes_passes(config("eagle3", v2=True))
    assert not makes_passes(config("draft_model", v2=True))
    assert not makes_passes(config("eagle", ranks=2))
    assert not makes_passes(config("draft_model", parallel=True))


def test_drafts_that_are_never_right_cost_a_percent_at_most():
    times = []
    for speculation in ({}, None):
        clock = Clock(token_s=2e-3)
        rest = {} if speculation is None else {"speculation": speculation}
        stepper = engine(lambda _: 0.0, clock=clock, policy="fcfs", **rest)
        stepper.most_tokens = 0 if speculation is None else DRAFT_TOKENS
        send(stepper, 8, output=300)
        for _ in range(100):
            stepper.step()
        begun = clock.now_s
        stepper.drain()
        times.append(clock.now_s - begun)
    assert times[0] <= 1.011 * times[1]


def test_a_client_whose_drafts_come_true_gets_them_and_another_does_not():
    clock = Clock(token_s=1e-3)
    stepper = engine(lambda name: float(name < "r4"), clock=clock, policy="fcfs", speculation={})
    for number in range(8):
        client = "right" if number < 4 else "wrong"
        stepper.scheduler.add_request(request(f"r{number}", [number] * 20, 200, client_id=client))
    stepper.drain()
    right = sum(sum(stepper.heard.by_request[f"r{i}"]) for i in range(4))
    wrong = sum(sum(stepper.heard.by_request.get(f"r{i}", [])) for i in range(4, 8))
    assert right > 4 * wrong


def test_a_request_that_is_behind_its_pace_gets_the_longer_drafts():
    clock = Clock(base_s=0.02, token_s=1.5e-3)
    stepper = engine(lambda _: 0.6, clock=clock, policy="fcfs", speculation={})
    for number in range(12):
        extra = {"tpot_slo_ms": 20.0} if number < 4 else {}
        stepper.scheduler.add_request(request(f"r{number}", [number] * 20, 150, client_id="c", **extra))
    for _ in range(40):
        stepper.step()
    pressed = sum(sum(stepper.heard.by_request.get(f"r{i}", [])) for i in range(4)) / 4
    others = sum(sum(stepper.heard.by_request.get(f"r{i}", [])) for i in range(4, 12)) / 8
    assert pressed > 1.5 * others


@BOTH
def test_without_speculation_in_the_configuration_drafts_are_left_alone(is_async):
    steps = []
    for make in (AsyncScheduler if is_async else Scheduler, make_scheduler):
        stepper = engine(lambda _: 0.6, is_async=is_async, make=make, policy="fcfs")
        send(stepper, 8)
        stepper.drain()
        steps.append(stepper.steps)
    assert steps[0] == steps[1]


def test_lengths_without_a_drafter_are_refused():
    settings = Settings(ours={"speculation": {}})
    with pytest.raises(ConfigurationError, match="--speculative-config"):
        build(settings, make_scheduler)


def test_statistics_carry_what_was_drafted(monkeypatch):
    monkeypatch.setenv(features.ASKED_FOR, "request-scheduler")
    stepper = engine(lambda _: 0.9, policy="fcfs", speculation={})
    send(stepper, 4)
    stepper.drain()
    stepper.clock.now_s += 60
    carried = stepper.scheduler.make_stats().kv_connector_stats[PAYLOAD_KEY]
    assert carried["drafts"]["allocated"] == stepper.heard.drafted
    assert carried["drafts"].keys() == {
        "allocated",
        "accepted",
        "wasted",
        "cut_off",
        "probes",
        "step_time_error",
    }


def test_places_that_vllm_fills_up_itself_are_no_drafts():
    model = StepTimeModel(find_profile("h100-13b"))
    drafts = Drafts(SpeculationConfig(), 4, model)
    budget = DraftBudget(drafts, lambda: 1.0, lambda _: SimpleNamespace(client="", tpot_slo_ms=None))
    row = np.array([drafts.row("r", "")])
    output = SimpleNamespace(
        num_scheduled_tokens={"r": 5},
        total_num_scheduled_tokens=5,
        scheduled_spec_decode_tokens={"r": [-1] * 4},
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={"r"}),
        num_invalid_spec_tokens=None,
        num_spec_tokens_to_schedule=4,
    )
    before = drafts.lengths.table.survival(row).copy()
    budget.scheduled(output)
    budget.executed(output, SimpleNamespace(sampled_token_ids=[[7]], req_id_to_index={"r": 0}))
    assert (drafts.lengths.table.survival(row) == before).all()
    assert budget.counts()["allocated"] == 0
